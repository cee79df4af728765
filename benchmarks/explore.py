"""Does the map of `ssl_explore run` stay quick with 50,000 images? Seconds to the first picture, and what a click, a pointer and a movement cost.
Four minutes; Chromium and Playwright are needed.

Features are random, in float16, around 20 directions; thumbnails are noise of 96×72 pixels, 200 different ones; the window has 1400×900 pixels,
and Chromium draws without a GPU. The page runs beside its server on the same cores. What the map keeps in map.npz is there already.

- map: seconds that the coordinates take, once, at the first opening, without UMAP.
- server: from the start of the command until it answers; it has read the features by then.
- first picture: from opening the address until the points stand on the page; median and longest of 7 openings, the browser's cache empty.
- click: from the click until the twelve neighbours stand in the panel with their thumbnails; median and longest of 30.
- pointing: finding the image under the pointer, mean of 2,000 places; until its thumbnail is shown, median and longest of 30.
- drawing: a picture of all points, as each movement draws one; median and longest of 20, at the whole map, and at a quarter of it with thumbnails on the map.
"""
import socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from PIL import Image
from playwright.sync_api import sync_playwright
from self_supervised.image_map import ImageMap, map_points

from measure import save, seconds

sys.path.insert(0, str(Path(__file__).parent.parent/'tests'))
from browser import find_browser # noqa: E402

n = 50_000

def write(path, dim):
    "A run's features.parquet, and the map.npz of an earlier opening"
    r = np.random.default_rng(0)
    groups = r.integers(0, 20, n)
    x = r.normal(size=(20,dim)).astype(np.float32)[groups]
    for o in np.array_split(x, 50): o += r.normal(size=o.shape)
    def thumb(i):
        res = BytesIO()
        Image.fromarray(r.integers(0, 256, (9,12,3), dtype=np.uint8)).resize((96,72), Image.Resampling.BICUBIC).save(res, 'JPEG', quality=85)
        return res.getvalue()
    thumbs = [thumb(i) for i in range(200)]
    size = pa.array([1600]*n, pa.int32())
    pq.write_table(pa.table(dict(path=[f'{i:06}.jpg' for i in range(n)], label=[f'class {g}' for g in groups], width=size, height=size,
        thumbnail=[thumbs[i%200] for i in range(n)], feature=pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float16).ravel()), dim))), path/'features.parquet', row_group_size=4096)
    xy = .5+np.c_[np.cos(groups*.314),np.sin(groups*.314)]*.4+r.normal(size=(n,2)).clip(-3, 3)*.03
    marks = np.full(n, -1, np.int32)
    marks[:500] = np.arange(500)
    np.savez(path/'map.npz', key=ImageMap(path/'features.parquet').key, xy=xy.astype(np.float32), why='', cluster=groups.astype(np.int32), outlier=marks, duplicate=marks//2)

@contextmanager
def server(path):
    "A started `ssl_explore`: its address, and the seconds until it answers"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    t = time.perf_counter()
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', 'from self_supervised.cli import ssl_explore; ssl_explore()', str(path), '--no-browser', '--port', str(port)],
                         stdout=subprocess.DEVNULL, cwd=path)
    url = f'http://127.0.0.1:{port}/'
    try:
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f'{url}map/info').close()
                break
            time.sleep(.02)
        yield url,time.perf_counter()-t
    finally:
        p.terminate()
        p.wait()

_click = '''async i => {
  const t = performance.now()
  await pick(i)
  while (![...document.querySelectorAll('#near img')].every(o => o.complete && o.naturalWidth)) await new Promise(requestAnimationFrame)
  return performance.now()-t
}'''
_nearest = '''() => {
  const t = performance.now()
  for (let i = 0; i<2000; i++) nearest(...toMap(Math.random()*width, Math.random()*height), 12/view.s)
  return (performance.now()-t)/2000
}'''
_point = '''async i => {
  const t = performance.now()
  hover(-1); hover(i, ...toScreen(i))
  const img = $('tip').firstElementChild
  while ($('tip').hidden || !img.complete || !img.naturalWidth) await new Promise(requestAnimationFrame)
  return performance.now()-t
}'''
_draw = '() => { const t = performance.now(); draw(); return performance.now()-t }'

def ready(page, what):
    while not page.evaluate(what): time.sleep(.01)

def measured(browser, dim):
    "A row"
    with TemporaryDirectory() as tmp:
        path = Path(tmp)
        write(path, dim)
        layout = seconds(lambda: map_points(ImageMap(path/'features.parquet').x))
        with server(path) as (url,started):
            first = []
            for _ in range(7):
                page = browser.new_page(viewport=dict(width=1400, height=900))
                t = time.perf_counter()
                page.goto(url, wait_until='commit')
                ready(page, '() => typeof xy!="undefined" && xy && rgb && !frame')
                first.append(time.perf_counter()-t)
                if len(first)<7: page.close()
            ready(page, '() => !info.doing && columns.duplicate')
            ids   = np.random.default_rng(1).integers(0, n, 60).tolist()
            click = [page.evaluate(_click, i) for i in ids[:30]]
            page.evaluate('unpick()')
            find  = page.evaluate(_nearest)
            point = [page.evaluate(_point, i) for i in ids[30:]]
            whole = [page.evaluate(_draw) for _ in range(20)]
            page.evaluate('zoom(2); $("pictures").checked = true; draw()')
            time.sleep(3)
            some = [page.evaluate(_draw) for _ in range(20)]
    def both(a): return f'{median(a):.3g} / {max(a):.3g}'
    return {'features': f'50,000 × {dim}', 'map, s':layout, 'server, s':started, 'first picture, s':both(first), 'click, ms':both(click), 'finding, ms':find,
            'thumbnail shown, ms':both(point), 'drawing, ms':both(whole), 'with thumbnails, ms':both(some)}

if __name__=='__main__':
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find_browser(), args=['--no-sandbox','--disable-gpu','--disable-dev-shm-usage'])
        rows = [measured(browser, dim) for dim in (128,2048)]
        browser.close()
    def part(*names): return [{k:o[k] for k in ('features',*names)} for o in rows]
    save('explore', __doc__.partition('\n\n')[2].strip(), {'Opening': part('map, s', 'server, s', 'first picture, s'), 'Using (median / longest)': part('click, ms', 'finding, ms', 'thumbnail shown, ms', 'drawing, ms', 'with thumbnails, ms')},
         ('streamlit','pyarrow'))
