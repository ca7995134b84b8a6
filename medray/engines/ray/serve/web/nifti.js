// Reads a NIfTI-1 file, plain or gzipped, and cuts slices out of it as radiologists hang them.

const TYPES = {
  2: ["getUint8", 1], 4: ["getInt16", 2], 8: ["getInt32", 4], 16: ["getFloat32", 4], 64: ["getFloat64", 8],
  256: ["getInt8", 1], 512: ["getUint16", 2], 768: ["getUint32", 4],
};

async function unpacked(file) {
  const head = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  if (head[0] !== 0x1f || head[1] !== 0x8b) return file.arrayBuffer();
  return new Response(file.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

/** {shape, affine (3 rows of 4, to RAS), at(i, j, k)}; null where the file is no NIfTI-1 of one volume. */
export async function readNifti(file) {
  const buffer = await unpacked(file);
  if (buffer.byteLength < 352) return null;
  const view = new DataView(buffer);
  const little = view.getInt32(0, true) === 348;
  if (!little && view.getInt32(0, false) !== 348) return null;
  const short = (at) => view.getInt16(at, little), float = (at) => view.getFloat32(at, little);
  const shape = [1, 2, 3].map((n) => Math.max(1, short(40 + 2 * n)));
  const kind = TYPES[short(70)];
  const start = Math.max(352, float(108));
  const count = shape[0] * shape[1] * shape[2];
  if (!kind || short(40) < 3 || buffer.byteLength < start + count * kind[1]) return null;
  const slope = float(112) || 1, intercept = float(112) ? float(116) : 0;
  const [get, size] = kind;
  const at = (i, j, k) => view[get](start + size * (i + shape[0] * (j + shape[1] * k)), little) * slope + intercept;
  return { shape, at, affine: affineOf(short, float) };
}

function affineOf(short, float) {
  if (short(254) > 0) return [280, 296, 312].map((at) => [0, 4, 8, 12].map((n) => float(at + n)));
  const [, dx, dy, dz] = [0, 1, 2, 3].map((n) => float(76 + 4 * n));
  if (short(252) <= 0) return [[dx, 0, 0, 0], [0, dy, 0, 0], [0, 0, dz, 0]];
  const [b, c, d] = [256, 260, 264].map(float);
  const a = Math.sqrt(Math.max(0, 1 - b * b - c * c - d * d));
  const step = [dx, dy, dz * (float(76) < 0 ? -1 : 1)];
  return [
    [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
    [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
    [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
  ].map((row, n) => [...row.map((value, m) => value * step[m]), float(268 + 4 * n)]);
}

/** For each of right, anterior, superior: the file's axis closest to it, and whether it runs the other way. */
export function orientation(affine) {
  const length = [0, 1, 2].map((axis) => Math.hypot(...affine.map((row) => row[axis])) || 1);
  const pairs = [0, 1, 2].flatMap((world) => [0, 1, 2].map((axis) => [Math.abs(affine[world][axis]) / length[axis], world, axis]));
  pairs.sort((one, other) => other[0] - one[0]);
  const found = [];
  for (const [, world, axis] of pairs) {
    if (found[world] || found.some((one) => one?.axis === axis)) continue;
    found[world] = { axis, reversed: affine[world][axis] < 0, spacing: length[axis] };
  }
  return found;
}

/** How a plane (0 sagittal, 1 coronal, 2 axial) is laid out: the patient's right on the left, anterior or superior up. */
export function layout(volume, plane) {
  const along = orientation(volume.affine);
  const [across, up] = [[1, 2], [0, 2], [0, 1]][plane].map((world) => along[world]);
  const through = along[plane];
  const size = (one) => volume.shape[one.axis];
  return {
    width: size(across), height: size(up), depth: size(through),
    aspect: (size(across) * across.spacing) / (size(up) * up.spacing),
    /** Voxel index of column x from the left, row y from the top, slice z from the lowest coordinate. */
    voxel(x, y, z) {
      const index = [0, 0, 0];
      const place = (one, n) => { index[one.axis] = one.reversed ? size(one) - 1 - n : n; };
      place(across, size(across) - 1 - x);  // left on the screen is right, or anterior, in the patient
      place(up, size(up) - 1 - y);
      place(through, z);
      return index;
    },
  };
}
