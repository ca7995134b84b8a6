// Reads a NIfTI-1 file, plain or gzipped, and cuts slices out of it as radiologists hang them.

const TYPES = {
  2: [Uint8Array, "getUint8"], 4: [Int16Array, "getInt16"], 8: [Int32Array, "getInt32"], 16: [Float32Array, "getFloat32"],
  64: [Float64Array, "getFloat64"], 256: [Int8Array, "getInt8"], 512: [Uint16Array, "getUint16"], 768: [Uint32Array, "getUint32"],
};

async function unpacked(file) {
  const head = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  if (head[0] !== 0x1f || head[1] !== 0x8b) return file.arrayBuffer();
  return new Response(file.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

/** {shape, affine (3 rows of 4, to RAS), data, at(i, j, k)}; null where the file is no NIfTI-1 of one volume. */
export async function readNifti(file) {
  const buffer = await unpacked(file);
  if (buffer.byteLength < 352) return null;
  const view = new DataView(buffer);
  const little = view.getInt32(0, true) === 348;
  if (!little && view.getInt32(0, false) !== 348) return null;
  const short = (at) => view.getInt16(at, little), float = (at) => view.getFloat32(at, little);
  const shape = [1, 2, 3].map((n) => Math.max(1, short(40 + 2 * n)));
  const kind = TYPES[short(70)];
  const start = Math.max(352, Math.trunc(float(108)) || 352);
  const count = shape[0] * shape[1] * shape[2];
  const further = [4, 5, 6, 7].filter((n) => n <= short(40)).some((n) => short(40 + 2 * n) > 1);
  if (!kind || short(40) < 3 || further || buffer.byteLength < start + count * kind[0].BYTES_PER_ELEMENT) return null;
  const data = valuesOf(buffer, view, kind, start, count, little);
  const scales = Number.isFinite(float(112)) && float(112) !== 0;
  const slope = scales ? float(112) : 1, intercept = scales && Number.isFinite(float(116)) ? float(116) : 0;
  const at = (i, j, k) => data[i + shape[0] * (j + shape[1] * k)] * slope + intercept;
  return { shape, data, at, affine: affineOf(short, float) };
}

function valuesOf(buffer, view, [Values, get], start, count, little) {
  const size = Values.BYTES_PER_ELEMENT;
  if (little) return new Values(buffer.slice(start, start + count * size));  // as all browsers' machines are
  const values = new Values(count);
  for (let n = 0; n < count; n++) values[n] = view[get](start + n * size, false);
  return values;
}

/** The sform, else the qform, else the standard's own, as the server's reader has them: each if it is a grid at all. */
function affineOf(short, float) {
  const sform = [280, 296, 312].map((at) => [0, 4, 8, 12].map((n) => float(at + n)));
  if (short(254) > 0 && isGrid(sform)) return sform;
  const qform = qformOf(float);
  if (short(252) > 0 && isGrid(qform)) return qform;
  const [dx, dy, dz] = [1, 2, 3].map((n) => Math.abs(float(76 + 4 * n)) || 1);
  return [[-dx, 0, 0, 0], [0, dy, 0, 0], [0, 0, dz, 0]];
}

function isGrid([[a, b, c], [d, e, f], [g, h, i]]) {
  const determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g);
  return Number.isFinite(determinant) && determinant !== 0;
}

function qformOf(float) {
  const [, dx, dy, dz] = [0, 1, 2, 3].map((n) => float(76 + 4 * n));
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

/** What is written at the left, right, top and bottom of a plane. */
export const MARKS = [["A", "P", "S", "I"], ["R", "L", "S", "I"], ["R", "L", "A", "P"]];

/** How many voxels above zero each slice has, by the file's axes. */
export function fullness(volume) {
  const [nx, ny, nz] = volume.shape;
  const counts = [new Uint32Array(nx), new Uint32Array(ny), new Uint32Array(nz)];
  for (let k = 0, n = 0; k < nz; k++)
    for (let j = 0; j < ny; j++)
      for (let i = 0; i < nx; i++, n++) if (volume.data[n] > 0) { counts[0][i]++; counts[1][j]++; counts[2][k]++; }
  return counts;
}

/** How a plane (0 sagittal, 1 coronal, 2 axial) is laid out: the patient's right on the left, anterior or superior up. */
export function layout(volume, plane) {
  const along = orientation(volume.affine);
  const [across, up] = [[1, 2], [0, 2], [0, 1]][plane].map((world) => along[world]);
  const through = along[plane];
  const size = (one) => volume.shape[one.axis];
  return {
    width: size(across), height: size(up), depth: size(through),
    /** Counts of fullness() from the lowest coordinate on. */
    along: (counts) => (through.reversed ? [...counts[through.axis]].reverse() : [...counts[through.axis]]),
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
