"The view explorer: its functions, and its page in a real browser"
import contextlib, importlib.util, inspect, io, os, random, re, socket, subprocess, sys, threading, time, urllib.error, urllib.request

import numpy as np, psutil, pytest, torch, torchvision.transforms.v2 as tv
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tvF

from browser import browser, new_page # noqa: F401 (a fixture)
from self_supervised import explore
from self_supervised.augmentations import get_batch_augs
from self_supervised.methods import ssl_methods
from self_supervised.packed import PackedImages, pack_images
from self_supervised.pipelines import make_views
from self_supervised.data import open_image
from self_supervised.cli import ssl_explore
from self_supervised.explore import (boxes_picture, crop_areas, example_images, read_image, seeded_views, view_changes, view_kinds,
                                     view_settings, views_call, views_picture, views_seconds)

in_browser = pytest.mark.slow
methods = 'swav','simclr'

def any_settings(method, r):
    "Settings as sliders could give them, with the noise of floats"
    res = {}
    for k,o in view_settings(method).items():
        def value():
            if o.range is None: return r.choice([o.default, None]) if k=='stats' else r.random()<.5
            lo,hi,step = o.range
            if k.endswith(('size','sizes')): hi = 48
            if k=='num_crops': lo,hi = 1,3
            return lo + r.randint(0, round((hi-lo)/step))*step
        res[k] = tuple(value() for _ in o.default) if isinstance(o.default, tuple) and k!='stats' else value()
        if k in ('resize_scale','resize_ratio','blur_s'): res[k] = tuple(sorted(res[k]))
    if 'min_scales' in res: res['min_scales'],res['max_scales'] = zip(*(sorted(o) for o in zip(res['min_scales'], res['max_scales'])))
    left_out = {k for k in res if r.random()<.3}
    if left_out & {'min_scales','max_scales'}: left_out |= {'min_scales','max_scales'}
    return {k:v for k,v in res.items() if k not in left_out}

def run(code):
    "What the names stand for after `code`"
    ns = {}
    exec(code, ns)
    return ns

def png(im, fmt='PNG', **kwargs):
    res = io.BytesIO()
    im.save(res, fmt, **kwargs)
    return res.getvalue()

def photo(w=80, h=60, mode='RGB'):
    a = np.random.default_rng(0).integers(0, 256, (h//4,w//4,3), dtype=np.uint8)
    return Image.fromarray(a).resize((w,h), Image.Resampling.BICUBIC).convert(mode)

# Settings and the call

@pytest.mark.parametrize('method', ssl_methods())
def test_every_parameter_has_a_place(method):
    f,known = ssl_methods()[method].get_aug_pipelines,view_settings(method)
    params = inspect.signature(f).parameters
    assert set(params)-set(known)=={'cuda','xtra_tfms'}
    for k,o in known.items():
        assert o.group!='More' and o.help, k
        if params[k].default is not inspect.Parameter.empty: assert o.default==params[k].default
        if o.range: assert all(o.range[0]<=v<=o.range[1] for v in (o.default if isinstance(o.default, tuple) else [o.default])), k
    line = next(o for o in inspect.getsource(get_batch_augs).splitlines() if 'blur_p:' in o)
    if method in methods: assert known['blur_p'].help==line.split('# ')[1] # others have their own

@pytest.mark.parametrize('method', methods)
def test_call_gives_the_same_views(method):
    r,x = random.Random(1),example_images(2, 64)
    for seed in range(15):
        settings = any_settings(method, r)
        augs = ssl_methods()[method].get_aug_pipelines(**view_changes(method, settings))
        views,boxes = seeded_views(augs, x, seed)
        code = views_call(method, settings, seed, 'example_images(2, 64)')
        ns   = run(code)
        assert len(ns['views'])==len(views)==len(boxes) and all(map(torch.equal, ns['views'], views)), code
        assert max(map(len, code.splitlines()))<=100

def test_call_names_only_what_differs():
    assert 'get_swav_aug_pipelines()' in views_call('swav', {k:o.default for k,o in view_settings('swav').items()})
    code = views_call('swav', dict(jitter_s=.1+.2, bw=True, blur=False, stats=None), 7)
    assert 'get_swav_aug_pipelines(jitter_s=0.3, blur=False, stats=None)' in code and 'torch.manual_seed(7)' in code
    assert 'get_simclr_aug_pipelines(size=96)' in views_call('simclr', dict(size=96))

def test_wrong_settings():
    with pytest.raises(ValueError, match="method='x' is unknown: there are .*swav"): view_settings('x')
    with pytest.raises(ValueError, match='cropsize is not a setting of simclr: there are size, '): view_changes('simclr', dict(cropsize=3))

# Views, boxes, areas, time

def test_boxes_are_those_of_the_views():
    x = example_images(3, 96)
    for same in (False,True):
        augs = ssl_methods()['swav'].get_aug_pipelines((2,3), (48,32), jitter=False, bw=False, blur=False, flip_p=0., stats=None, same_on_batch=same)
        views,boxes = seeded_views(augs, x, 3)
        assert [len(v[0,0]) for v in views]==[48,48,32,32,32]
        for v,b in zip(views, boxes):
            for i,o in enumerate(b.tolist()):
                ref = tvF.resized_crop(x.images[i], *o, v.shape[2:], antialias=True)
                assert (v[i]*255-ref).abs().max()<=1.01
        parts = [b/x.sizes.repeat(1,2) for b in boxes] # of the height and width of their own image
        assert all(((p-p[:1]).abs().max()<.02)==same for p in parts)

@pytest.mark.filterwarnings('ignore:images with 1 channel')
def test_random_state_and_pipelines_are_left_alone():
    x,augs = example_images(2, 64),ssl_methods()['simclr'].get_aug_pipelines(32)
    before = torch.get_rng_state()
    seeded_views(augs, x); crop_areas(augs, 64); views_seconds(augs, x, 2, 1)
    with pytest.raises(ValueError, match='stats are for 3 channel'): seeded_views(augs, pack_images([o[:1] for o in x.images]))
    assert torch.equal(before, torch.get_rng_state())
    assert 'params' not in vars(augs[0].fs[0])

def test_visitors_do_not_disturb_each_other():
    x,augs = example_images(2, 64),ssl_methods()['swav'].get_aug_pipelines(crop_sizes=(48,32))
    alone,got = [seeded_views(augs, x, i)[0] for i in range(8)],{}
    def visit(i): got[i] = [seeded_views(augs, x, i)[0] for _ in range(5)]
    threads = [threading.Thread(target=visit, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(torch.equal(a, b) for i in range(8) for views in got[i] for a,b in zip(alone[i], views))

@pytest.mark.parametrize('scale,size', [((.05,.14),(256,256)), ((.25,1.),(256,256)), ((.08,1.),(128,320))])
def test_areas_are_those_of_torchvision(scale, size):
    augs = ssl_methods()['simclr'].get_aug_pipelines(64, resize_scale=scale)
    (name,got), = crop_areas(augs, size, n=3000).items()
    assert name=='2 × 64 px' and len(got)==3000
    im  = torch.zeros(3, *size)
    ref = torch.tensor([area(im, scale) for _ in range(3000)])
    q = torch.linspace(.02, .98, 25)
    assert (got.quantile(q)-ref.quantile(q)).abs().max() < .12*(scale[1]-scale[0])
    assert got.min()>scale[0]*.95 and got.max()<=min(1., scale[1]*1.05)

def test_areas_of_images_of_their_own():
    "are those of each: a narrow one gives what it alone would"
    augs,sizes = ssl_methods()['simclr'].get_aug_pipelines(64, resize_scale=(.5,1.)),torch.tensor([[64,64],[64,512]])
    got, = crop_areas(augs, sizes, n=4000).values()
    for i,size in enumerate(sizes.tolist()):
        ref = torch.tensor([area(torch.zeros(3, *size), (.5,1.)) for _ in range(2000)])
        q = torch.linspace(.02, .98, 25)
        assert (got[i::2].quantile(q)-ref.quantile(q)).abs().max()<.06
    assert got[1::2].max()<.18 # torchvision's fallback: 85 of 512 columns

def area(im, scale):
    p = tv.RandomResizedCrop(64, scale).make_params([im])
    return p['height']*p['width']/(im.shape[1]*im.shape[2])

def test_kinds_of_one_size_keep_apart():
    augs = ssl_methods()['swav'].get_aug_pipelines((2,3), (64,64))
    assert list(view_kinds(augs))==['2 × 64 px', '3 × 64 px']
    augs = ssl_methods()['swav'].get_aug_pipelines((2,2), (64,(32,64)))
    assert list(view_kinds(augs))==['2 × 64 px', '2 × 32×64 px']
    augs = ssl_methods()['swav'].get_aug_pipelines((2,2), (64,64))
    assert list(view_kinds(augs))==['2 × 64 px', '2 × 64 px, 5% to 14%'] and len(crop_areas(augs, 64, 10))==2

def test_views_picture():
    x,augs = example_images(3, 64),ssl_methods()['simclr'].get_aug_pipelines((32,48))
    views  = seeded_views(augs, x)[0]
    a = np.asarray(views_picture(augs, views))
    assert a.shape==(3*36+4, 2*52+4, 4)
    mean,std = (np.array(o) for o in ([.485,.456,.406],[.229,.224,.225]))
    for i in range(3):
        for j,v in enumerate(views):
            ref = (v[i].permute(1,2,0).numpy()*std+mean).clip(0, 1)*255
            tile = a[4+36*i:36+36*i, 4+52*j:52+52*j]
            assert np.abs(tile[...,:3]-ref).max()<=.51 and (tile[...,3]==255).all()
    assert a[...,3].sum()==255*3*2*32*48 # and nothing but the views is opaque

def test_boxes_picture():
    x = [torch.zeros(3,*o, dtype=torch.uint8) for o in ((64,64), (60,100), (50,150), (70,200))]
    box = torch.tensor([[10,20,30,16], [0,80,60,20], [5,130,40,20], [69,199,1,1]])
    a = np.asarray(boxes_picture(x, [box], [[0]])) # rows of 6*70 pixels
    corners = (4,4), (4,72), (4,176), (72,4) # of the images
    assert a.shape==(72+70+4, 176+150+4, 4) and (a[...,3]>0).sum()==sum(o[0].numel() for o in x)
    for (t,l),im,(bt,bl,bh,bw) in zip(corners, x, box.tolist()):
        ys,xs = np.nonzero(a[t:t+im.shape[1], l:l+im.shape[2], 0])
        assert (ys.min(),ys.max(),xs.min(),xs.max())==(bt,bt+bh-1,bl,bl+bw-1)

def test_seconds(monkeypatch):
    x,augs = example_images(2, 64),ssl_methods()['simclr'].get_aug_pipelines(32)
    sizes = []
    now = iter([0,9, 10,11, 20,25, 30,33]) # a slow first one, then 1, 5 and 3 seconds
    monkeypatch.setattr(explore, 'make_views', lambda augs, x: sizes.append(len(x)))
    monkeypatch.setattr(explore.time, 'perf_counter', lambda: next(now))
    assert views_seconds(augs, x, bs=7, n=3)==3 and sizes==[7]*4

# Images

@pytest.mark.parametrize('mode', ['L','LA','RGB','RGBA','P','1','CMYK','YCbCr'])
def test_modes(mode, tmp_path):
    fmt = 'TIFF' if mode in ('CMYK','YCbCr') else 'PNG'
    data = png(photo(mode=mode), fmt)
    (tmp_path/'a').write_bytes(data)
    got = read_image(data, 32)
    assert got.shape==(3,32,43) and got.dtype==torch.uint8
    assert torch.equal(got, open_image(tmp_path/'a', None, short_side=32)) and torch.equal(got, read_image(tmp_path/'a', 32))

def test_more_bits():
    a = np.linspace(0, 1, 64*64).reshape(64,64)
    for arr,fmt in (((a*65535).astype(np.uint16),'PNG'), (a.astype(np.float32),'TIFF'), ((a*300).astype(np.float32),'TIFF'), ((a*65535).astype(np.int32),'TIFF')):
        got = read_image(png(Image.fromarray(arr), fmt), 64)
        assert (got[0]-a*255).abs().max()<=1 and torch.equal(got[0], got[2]), arr.dtype

def test_turned_and_tiny():
    im = photo()
    exif = im.getexif()
    exif[0x112] = 6
    turned = png(im, 'JPEG', exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))
    assert upright.size==(60,80)
    assert torch.equal(read_image(turned, 60), torch.from_numpy(np.array(upright)).permute(2,0,1))
    for size,shape in (((1,1),(1,1)), ((1,300),(3,1)), ((3,2),(2,3)), ((64,32),(32,64)), ((400,40),(32,96)), ((40,400),(96,32))): # (w,h), (h,w)
        assert read_image(png(photo(*(max(4,o) for o in size)).resize(size)), 32).shape==(3,*shape)

def test_refused(tmp_path):
    whole,jpg = png(photo(400,300)),png(photo(400,300), 'JPEG')
    bad = {'a text.png':(b'just a text', 'not one of BMP, GIF, JPEG, PNG, TIFF, WEBP'), 'empty.jpg':(b'', 'not one of'),
           'drawing.svg':(b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not one of'), 'print.eps':(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not one of'),
           'half.png':(whole[:len(whole)//2], ''), 'half.jpg':(jpg[:len(jpg)//2], 'truncated'),
           'large.png':(png(Image.new('1', (9000,7000))), 'more than 50 million pixels'), 'bomb.png':(png(Image.new('1', (20000,20000))), 'more than 50 million pixels')}
    for nm,(data,why) in bad.items():
        with pytest.raises(ValueError, match=f'^{nm} is not used: .*{why}'): read_image(data, 32, nm)
    (tmp_path/'b.png').write_bytes(b'text')
    with pytest.raises(ValueError, match='b.png is not used'): read_image(tmp_path/'b.png')
    with pytest.raises(ValueError, match='none.png is not used: .*No such file'): read_image(tmp_path/'none.png')

def test_examples():
    random.seed(3)
    state = random.getstate()
    x = example_images(5, 64)
    assert random.getstate()==state and torch.equal(x.pixels, example_images(5, 64).pixels) and type(x) is PackedImages
    assert len({o.numpy().tobytes() for o in x.images})==5 and min(o.float().std() for o in x.images)>30
    assert all((o[0]!=o[2]).any() for o in x.images) # in colour
    assert x.sizes.tolist()==[[75,64], [64,85], [64,64], [64,160], [64,85]]

# The command

def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'streamlit', None)
    for f in (lambda: ssl_explore(port=1), explore.explore_page):
        with pytest.raises(ImportError, match=re.escape("needs Streamlit, which is not installed: pip install 'self_supervised[explore]'")): f()
    monkeypatch.setattr(sys, 'argv', ['ssl_explore'])
    with pytest.raises(SystemExit, match=r'^ssl_explore: the view explorer needs Streamlit'): ssl_explore() # as a command: a line, no traceback

def test_importing_needs_no_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'streamlit', None)
    spec  = importlib.util.spec_from_file_location('self_supervised.explore_again', explore.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert 'get_swav_aug_pipelines()' in again.views_call('swav', {})

def test_wrong_use(tmp_path):
    (tmp_path/'a.png').write_bytes(b'text')
    for kw,why in ((dict(source='nowhere'), "source='nowhere' is not a folder"), (dict(source=str(tmp_path)), 'a.png is not used'), (dict(size=0), 'size=0 must be')):
        with pytest.raises(ValueError, match=why): ssl_explore(**kw)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(ValueError, match=f'--port {port} is taken: give another'): ssl_explore(port=port)

# The page

def test_begins_with_files(tmp_path):
    testing = pytest.importorskip('streamlit.testing.v1')
    files = [str(tmp_path/f'{i}.png') for i in range(4)]
    for i,o in enumerate(files): photo(*((80,60), (60,80), (400,40), (30,20))[i]).save(o)
    page = testing.AppTest.from_string(f'from self_supervised.explore import explore_page; explore_page({files}, 64)', default_timeout=30).run()
    assert not page.exception and not page.error
    ns = run(page.code[0].value)
    assert ns['x'].sizes.tolist()==[[60,80], [80,60], [40,120]] and all(map(torch.equal, ns['x'].images, (read_image(o, 64) for o in files)))
    page.slider(key='n').set_value(1).run()
    assert files[0] in page.code[0].value and files[1] not in page.code[0].value

@pytest.fixture(scope='module')
def server(tmp_path_factory, browser): # noqa: F811
    "A started `ssl_explore`; `asked` are the connections that it made to a proxy, which would take it out of this machine"
    proxy,asked = socket.create_server(('127.0.0.1', 0)),[]
    def listen():
        with contextlib.suppress(OSError):
            while True: asked.append(proxy.accept()[0].recv(200))
    threading.Thread(target=listen, daemon=True).start()
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    home  = tmp_path_factory.mktemp('home')
    proxies = {o: f'http://127.0.0.1:{proxy.getsockname()[1]}' for o in ('http_proxy','https_proxy','HTTP_PROXY','HTTPS_PROXY')}
    with open(home/'log', 'w') as log:
        p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', 'from self_supervised.cli import ssl_explore; ssl_explore()', '--no-browser', '--port', str(port)],
                             stdout=log, stderr=log, cwd=home, env={**os.environ, **proxies, 'NO_PROXY':'', 'no_proxy':'', 'HOME':str(home), 'TMPDIR':str(home), 'OMP_NUM_THREADS':'1'})
    p.home,p.url,p.port,p.asked,p.log = home,f'http://127.0.0.1:{port}',port,asked,(home/'log').read_text
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f'{p.url}/_stcore/health').status==200: break
            assert p.poll() is None, p.log()
            time.sleep(.1)
        yield p
    finally:
        p.terminate()
        p.wait(20)
        proxy.close()

def ready(page):
    "Wait until the page has run to its end"
    page.get_by_text('What the encoder gets').wait_for()
    page.locator('[data-testid=stApp][data-test-script-state=notRunning]').wait_for()
    return page

def picture(page, alt):
    "The picture whose alternative text begins with `alt`, in pixels"
    src = page.locator(f'img[alt^="{alt}"]').first.get_attribute('src')
    return np.asarray(Image.open(io.BytesIO(page.request.get(page.evaluate('o => new URL(o, location).href', src)).body())))

def code(page): return page.locator('[data-testid=stCode]').inner_text()

def thumb(page, slider): return page.get_by_role('group', name=slider, exact=True).get_by_role('slider')

def press(page, slider, key):
    before = code(page)
    thumb(page, slider).press(key)
    page.wait_for_function('before => document.querySelector("[data-testid=stCode]").innerText!=before', arg=before)
    ready(page)

def choose(page, name, called):
    "Another method, or the same"
    ready(page).get_by_role('radio', name=name, exact=True).click()
    page.wait_for_function('o => document.querySelector("[data-testid=stCode]").innerText.includes(o)', arg=f'get_{called}_aug')
    ready(page)

def same_views(page, ns):
    "Are the views on the page those that the call gave?"
    for name,augs in view_kinds(ns['augs']).items():
        a = picture(page, f'Views, {name}')
        for i,(aug,v) in enumerate((p,v) for p,v in zip(ns['augs'], ns['views']) if any(p is o for o in augs)):
            for j,o in enumerate(aug.decode(v).clamp(0, 1)*255):
                (h,w),ref = o.shape[1:],o.permute(1,2,0).numpy()
                if np.abs(a[4+j*(h+4):(j+1)*(h+4), 4+i*(w+4):(i+1)*(w+4), :3]-ref).max()>1: return False
    return True

@in_browser
def test_page(browser, server): # noqa: F811
    with new_page(browser, server.url, permissions=['clipboard-read','clipboard-write']) as page:
        choose(page, 'SWAV', 'swav')
        assert page.title()=='View explorer' and 'get_swav_aug_pipelines()' in code(page)
        first = picture(page, 'Views, 2 × 224')
        for _ in range(4): press(page, 'jitter_s', 'ArrowRight')
        press(page, 'num_crops[1]', 'ArrowLeft')
        assert 'num_crops=(2, 5), jitter_s=1.4' in code(page)
        assert (picture(page, 'Views, 2 × 224')!=first).any() and picture(page, 'Views, 5 × 96').shape[1]==5*100+4

        page.locator('[data-testid=stCode]').hover()
        page.get_by_role('button', name='Copy to clipboard').click()
        copied = page.evaluate('navigator.clipboard.readText()')
        assert copied.strip()==code(page).strip()
        ns = run(copied)
        assert same_views(page, ns)
        torch.manual_seed(43)
        assert not same_views(page, dict(ns, views=make_views(ns['augs'], ns['x']))) # another seed would be noticed

        choose(page, 'SimCLR', 'simclr')
        assert 'get_simclr_aug_pipelines(size=224, jitter_s=1.4)' in code(page) # shared settings are kept
        assert page.locator('img[alt^="Views"]').count()==1 and same_views(page, run(code(page)))

        names = [o.callback.__name__ for o in ssl_methods().values()]
        assert page.get_by_role('radio').count()==len(names) and all(page.get_by_role('radio', name=o, exact=True).count()==1 for o in names)
        choose(page, 'DeepCluster', 'deepcluster')
        assert 'get_deepcluster_aug_pipelines(jitter_s=1.4)' in code(page) and picture(page, 'Views, 2 × 160').shape[1]==2*164+4 # what has another default is left there

        for k in ('num_crops[0]','num_crops[1]'): thumb(page, k).press('Home') # an impossible setting
        page.get_by_text('aug_pipelines is empty').wait_for()
        thumb(page, 'num_crops[0]').press('ArrowRight')
        ready(page)

@in_browser
def test_uploads(browser, server, tmp_path): # noqa: F811
    data = {'my photo.png':png(photo(300,200)), 'grey.jpg':png(photo(90,90,'L'), 'JPEG'), 'strip.png':png(photo(2000,200)), 'notes.png':b'a text', 'turned.svg':b'<svg/>'}
    for k,v in data.items(): (tmp_path/k).write_bytes(v)
    (tmp_path/'huge.bmp').write_bytes(b'BM' + bytes(21*2**20))
    with new_page(browser, server.url) as page:
        ready(page)
        upload = page.locator('input[type=file]')
        upload.set_input_files([tmp_path/o for o in data])
        for o in ('notes.png','turned.svg'): page.get_by_text(f'{o} is not used: it is not one of').wait_for()
        page.wait_for_function('document.querySelector("[data-testid=stCode]").innerText.includes("photo.png")')
        ready(page)
        assert "[read_image(o, 256) for o in ['my photo.png', 'grey.jpg', 'strip.png']]" in code(page)
        assert picture(page, 'The images').shape==(4+204, 4+304+94+604, 4) # whole, each in its own shape; of the strip as much as training takes at a time
        with contextlib.chdir(tmp_path): assert same_views(page, run(code(page)))
        upload.set_input_files([tmp_path/'huge.bmp'])
        page.get_by_text(re.compile('20(.0)?MB or smaller')).wait_for()
    assert not [o for o in server.home.rglob('*') if o.is_file() and data['my photo.png'][-500:] in o.read_bytes()]
    with new_page(browser, server.url) as page: # another visitor does not see them
        assert 'example_images(3, 256)' in code(ready(page))
        for o in ('a','b'): # two files of one name, in a folder that is dropped
            (tmp_path/'folder'/o).mkdir(parents=True)
            (tmp_path/'folder'/o/'1.png').write_bytes(data['my photo.png'])
        box = page.get_by_test_id('stFileUploaderDropzone').bounding_box()
        at,cdp = dict(x=box['x']+9, y=box['y']+9),page.context.new_cdp_session(page)
        for o in ('dragEnter','dragOver','drop'):
            cdp.send('Input.dispatchDragEvent', dict(at, type=o, data=dict(items=[], files=[str(tmp_path/'folder')], dragOperationsMask=1)))
        page.wait_for_function('document.querySelector("[data-testid=stCode]").innerText.includes("[\'1.png\', \'1.png\']")')
        page.locator('input[type=file]').set_input_files([dict(name=f'{i}.txt', mimeType='text/plain', buffer=b'text') for i in range(18)])
        page.get_by_text('20 files: the first 16 are used').wait_for()
        assert 14<=ready(page).get_by_text('txt is not used').count()<=16 # the others are not looked at

@in_browser
@pytest.mark.parametrize('width,scheme', [(1400,'dark'), (390,'light')])
def test_widths(browser, server, width, scheme): # noqa: F811
    with new_page(browser, server.url, width, color_scheme=scheme) as page:
        page.get_by_text('In Python').wait_for()
        assert page.evaluate('document.documentElement.scrollWidth')<=width
        assert page.evaluate('document.querySelector("[data-testid=stMain]").scrollWidth')<=width
        assert all(page.locator('img').evaluate_all('os => os.map(o => o.alt.length>10 && o.getBoundingClientRect().width<=innerWidth)'))

@in_browser
def test_stays_on_this_machine(server):
    p = psutil.Process(server.pid)
    listening = {o.laddr.ip for o in p.net_connections('inet') if o.status==psutil.CONN_LISTEN}
    assert listening=={'127.0.0.1'}
    others = [a.address for nm in psutil.net_if_addrs().values() for a in nm if a.family==socket.AF_INET and not a.address.startswith('127.')]
    for o in others:
        with socket.socket() as s:
            s.settimeout(3)
            assert s.connect_ex((o, server.port))!=0
    for origin,status in (('http://elsewhere.example',403), (server.url,101)): # a page from elsewhere may not talk to it
        with socket.create_connection(('127.0.0.1', server.port), timeout=20) as s:
            s.sendall(f'GET /_stcore/stream HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nOrigin: {origin}\r\n'
                      'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n'.encode())
            assert s.recv(60).startswith(f'HTTP/1.1 {status}'.encode())
    assert server.asked==[]
