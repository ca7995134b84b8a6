"""The page at /, in a real browser against the real server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tests.integration.serve.browser import PROGRAM, Browser
from tests.unit.engines.ray.serve.samples import nifti_bytes, nii, png

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium, which is not installed")


def oblique(axes: str) -> nib.Nifti1Image:
    """A volume in another orientation whose brightest voxel is right, anterior and superior of the middle."""
    values = np.full((20, 18, 16), 100.0, np.float32)
    values[15:18, 13:16, 11:14] = 400.0
    scan = nib.Nifti1Image(values, np.diag([2.0, 1.0, 3.0, 1.0]))
    turn = nib.orientations.axcodes2ornt(axes)
    return scan.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(scan.affine), turn))


BRIGHTEST = """(() => {
  const canvas = document.getElementById('canvas'), pixels = canvas.getContext('2d')
    .getImageData(0, 0, canvas.width, canvas.height).data;
  let [x, y, n] = [0, 0, 0];
  for (let at = 0; at < pixels.length; at += 4) if (pixels[at] > 200 && pixels[at] === pixels[at + 2]) {
    x += (at / 4) % canvas.width; y += Math.floor(at / 4 / canvas.width); n += 1;
  }
  return [x / n / canvas.width, y / n / canvas.height, n];
})()"""


def test_a_scan_is_dropped_answered_and_looked_at(server: Any, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(png())
    (tmp_path / "scan.nii.gz").write_bytes(nifti_bytes(nii()))
    for axes in ("RAS", "LPI", "SRA"):
        nib.save(oblique(axes), tmp_path / f"{axes}.nii")

    async def use() -> None:
        async with Browser(tmp_path / "profile") as page:
            await page.open(server.url)
            await page.wait("document.getElementById('state').textContent.includes('401')")
            await page.read(
                f"(() => {{ const key = document.getElementById('key'); key.value = '{server.key}'; "
                "key.dispatchEvent(new Event('change')); })()"
            )
            await page.wait("document.getElementById('model').options.length === 2")

            await page.hand_over("#file", tmp_path / "picture.png")
            await page.wait("document.getElementById('state').textContent === 'picture.png'")
            answer = await page.read("document.getElementById('answer').innerText")
            assert "normal" in answer and "ill" in answer and "%" in answer
            assert "Not a medical device" in await page.read("document.getElementById('use').textContent")
            assert await page.read("document.getElementById('picture').naturalWidth") > 0

            await page.read("(document.getElementById('model').value = 'seg', null)")
            await page.hand_over("#file", tmp_path / "scan.nii.gz")
            await page.wait("document.getElementById('state').textContent === 'scan.nii.gz'")
            assert "ml" in await page.read("document.getElementById('answer').innerText")
            size = "[document.getElementById('canvas').width, document.getElementById('canvas').height]"
            assert await page.read(size) == [20, 18]
            coloured = (
                "[...document.getElementById('canvas').getContext('2d').getImageData(0, 0, 20, 18).data]"
                ".filter((v, n, all) => n % 4 === 0 && v !== all[n + 1]).length"
            )
            assert await page.read(coloured) > 0  # the mask is drawn
            await page.screenshot(tmp_path / "page.png")

            for axes in ("RAS", "LPI", "SRA"):
                await page.hand_over("#file", tmp_path / f"{axes}.nii")
                await page.wait(f"document.getElementById('state').textContent === '{axes}.nii'")
                await page.read(
                    "(() => { for (const [id, value] of [['opacity', 0], ['slice', 12]]) { "
                    "document.getElementById(id).value = value; "
                    "document.getElementById(id).dispatchEvent(new Event('input')); } })()"
                )
                x, y, count = await page.read(BRIGHTEST)
                # The patient's right is on the screen's left; anterior is up.
                assert count == 9 and x == pytest.approx(3 / 20, abs=0.06) and y == pytest.approx(3 / 18, abs=0.06)
            assert page.asked and all(one.startswith((server.url, "blob:", "data:")) for one in page.asked)
            assert page.broken == []

    asyncio.run(use())
