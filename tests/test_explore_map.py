"The map of images: what it knows against slow loops, what its server answers and refuses, and its page in a real browser"
import contextlib, http.client, importlib, io, json, math, os, re, socket, struct, subprocess, sys, time

import numpy as np, psutil, pytest, torch
from matplotlib.path import Path as Polygon
from PIL import Image
from torch.nn import functional as F

from browser import browser, new_page # noqa: F401 (a fixture)
from self_supervised import cli, cli_explore, image_map
from self_supervised.cli_explore import find_features, ssl_explore
from self_supervised.cli_judge import learner_of
from self_supervised.explore_map import refused
from self_supervised.image_map import ImageMap, group_list, map_points, to_centre
from self_supervised.neighbors import find_duplicates, find_outliers

pa = pytest.importorskip('pyarrow', reason="NO TESTS OF THE MAP: pyarrow is not installed (pip install 'self_supervised[dev]')")
pq = pytest.importorskip('pyarrow.parquet')
in_browser = pytest.mark.slow

def jpeg(colour, size=(48,32)):
    res = io.BytesIO()
    Image.new('RGB', size, colour).save(res, 'JPEG')
    return res.getvalue()

def write(file, x, labels=None, thumbs=None, root=None, paths=None, sizes=None, rows=None):
    "A file of features as `embed` writes it"
    x,n   = np.asarray(x),len(x)
    sizes = sizes or [(48,32)]*n
    cols  = dict(path=paths or [f'{i:05}.png' for i in range(n)], width=pa.array([w for w,_ in sizes], pa.int32()), height=pa.array([h for _,h in sizes], pa.int32()),
                feature=pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]))
    if labels is not None: cols['label'] = labels
    if thumbs is not None: cols['thumbnail'] = pa.array(thumbs, pa.binary())
    meta = dict(model='run', normalization=None, size=32, **({'root':str(root)} if root else {}))
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(cols).replace_schema_metadata({'self_supervised': json.dumps(meta)}), file, row_group_size=rows)
    return file

def blobs(sizes=(40,30,20), dim=16, seed=0):
    "Features in groups that lie far apart, and the group of each"
    r = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    return (np.eye(dim)[groups]*3+r.normal(size=(len(groups),dim))*.15).astype(np.float32),groups

def cosines(x):
    x = np.asarray(x, dtype=np.float64)
    x = x/np.linalg.norm(x, axis=1, keepdims=True)
    return x@x.T

def cards_of(b):
    "Cards with their thumbnails, as the page takes them apart"
    n, = struct.unpack('<I', b[:4])
    cards,at = json.loads(b[4:4+n]),4+n
    for o in cards:
        o['thumb'] = b[at:at+o['bytes']]
        at += o['bytes']
    assert at==len(b)
    return cards

# Coordinates

def test_others_stand_between(monkeypatch):
    x = F.normalize(torch.randn(50, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    laid,xy = [],torch.rand(12, 2, generator=torch.Generator().manual_seed(2))*9
    def fake(o):
        laid.append(o)
        return xy.numpy()
    monkeypatch.setattr(image_map, 'tsne_map', fake)
    got = map_points(x, n=12).astype(float)
    fixed = [next(i for i in range(50) if torch.equal(x[i], o)) for o in laid[0]]
    want = np.zeros((50,2))
    for i in range(50):
        if i in fixed: want[i] = xy[fixed.index(i)]
        else:
            sims = sorted(((float(x[i]@x[j]), k) for k,j in enumerate(fixed)), reverse=True)[:3]
            want[i] = sum(np.array(xy[k])/(1-s) for s,k in sims)/sum(1/(1-s) for s,_ in sims)
    want -= want.min(0)
    want /= want.max()
    want += (1-want.max(0))/2 # in the middle
    assert np.abs(got-want).max()<1e-4 and got.min()>=0 and got.max()<=1

@pytest.mark.parametrize('n,dim', [(1,4), (2,4), (4,1), (7,1), (9,3)])
def test_few_images(n, dim):
    x = F.normalize(torch.randn(n, dim), dim=1)
    xy = map_points(x)
    assert xy.shape==(n,2) and np.isfinite(xy).all() and xy.min()>=0 and xy.max()<=1

def test_the_same_again_and_equal_images():
    x = F.normalize(torch.ones(30, 4), dim=1)
    assert np.isfinite(map_points(x)).all()
    x = torch.as_tensor(blobs()[0])
    state = torch.get_rng_state()
    assert (map_points(x, n=40)==map_points(x, n=40)).all() and torch.equal(state, torch.get_rng_state())

@pytest.fixture
def umap(tmp_path, monkeypatch):
    "A module that stands in for UMAP: two of the features, with others in between"
    (tmp_path/'umap.py').write_text('class UMAP:\n    def __init__(self, **how): self.how = how\n    def fit_transform(self, x):\n        assert self.how["metric"]=="cosine" and self.how["n_neighbors"]<len(x)\n        return x[:,[1,0]]*[2,1]\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'umap', raising=False)
    importlib.invalidate_caches()
    yield
    sys.modules.pop('umap', None)

def test_umap(umap, tmp_path):
    x = blobs()[0]
    m = ImageMap(write(tmp_path/'run/features.parquet', x))
    m.compute()
    want = (x/np.linalg.norm(x, axis=1, keepdims=True))[:,[1,0]]*[2,1]
    want = (want-(want.min(0)+want.max(0))/2)/np.ptp(want, axis=0).max()+.5
    assert m.how=='UMAP' and np.abs(m.xy-want).max()<1e-5

# Groups

def test_groups():
    r = np.random.default_rng(3)
    x = F.normalize(torch.as_tensor(r.normal(size=(200,5)).astype(np.float32)), dim=1)
    g = r.integers(-1, 7, 200)
    sim = to_centre(x, g)
    for i in range(200):
        centre = sum((x[j] for j in range(200) if g[j]==g[i]), torch.zeros(5))
        assert abs(sim[i]-(float(x[i]@centre/centre.norm()) if g[i]>=0 else 0))<1e-5
    res = group_list(g, sim, k=4, most=5)
    assert [o['n'] for o in res]==sorted((int((g==o).sum()) for o in range(7)), reverse=True)[:5]
    for o in res:
        own = sorted((i for i in range(200) if g[i]==o['number']), key=lambda i: -sim[i])
        assert o['ids']==own[:4] and o['n']==len(own)
    assert group_list(np.full(4, -1), np.zeros(4))==[]

def test_columns(tmp_path):
    x,groups = blobs()
    x[5],x[50] = x[4],x[49]*2
    sizes = [(48,32)]*90
    sizes[5],sizes[50] = (99,99),(10,10)
    labels = [None if i==3 else 'xyz'[o] for i,o in enumerate(groups)]
    m = ImageMap(write(tmp_path/'features.parquet', x, labels, sizes=sizes))
    assert m.info()['columns']==[] and not m.info()['points']
    m.compute()
    assert m.columns['label'].tolist()==[-1 if i==3 else o for i,o in enumerate(groups)] and m.names['label']==[*'xyz']
    assert {o['number']:o['n'] for o in m.groups['label']}=={0:39, 1:30, 2:20}
    t = torch.as_tensor(x)
    dup = find_duplicates(F.normalize(t, dim=1))
    assert {frozenset(np.flatnonzero(m.columns['duplicate']==o).tolist()) for o in range(len(dup))}=={frozenset(map(int, o)) for o in dup}
    pairs = [o['ids'] for o in m.groups['duplicate']]
    assert [5,4] in pairs and [49,50] in pairs # the larger image first
    odd = find_outliers(F.normalize(t, dim=1), k=20).argsort(descending=True)
    assert m.columns['outlier'].max()==0 and m.columns['outlier'][odd[0]]==0 and m.groups['outlier'][0]['ids']==[int(odd[0])]
    n = len(np.unique(m.columns['cluster']))
    assert m.info()['counts']['cluster']==n and all(o['mostly'][0] in 'xyz' for o in m.groups['cluster'])
    o = m.groups['cluster'][0]
    own = [labels[i] for i in np.flatnonzero(m.columns['cluster']==o['number']) if labels[i]]
    assert o['mostly'][1]==round(max(own.count(l) for l in 'xyz')/len(own), 3)

def test_no_images(tmp_path):
    with pytest.raises(ValueError, match='holds no images: make it again, with ssl_embed'): ImageMap(write(tmp_path/'features.parquet', np.zeros((0,4), np.float32)))

# What is kept

def test_kept(tmp_path, monkeypatch):
    file = write(tmp_path/'run/features.parquet', blobs()[0])
    first = ImageMap(file)
    first.compute()
    asked = []
    for o in ('map_points','cluster','find_outliers','find_duplicates'):
        f = getattr(image_map, o)
        monkeypatch.setattr(image_map, o, lambda *a, _f=f, _o=o, **k: (asked.append(_o), _f(*a, **k))[1])
    def again():
        asked.clear()
        m = ImageMap(file)
        m.compute()
        return m
    m = again()
    assert asked==[] and (m.xy==first.xy).all() and m.why==first.why and all((m.columns[k]==first.columns[k]).all() for k in first.columns) and m.groups==first.groups
    for spoil in (b'', b'PK\x03\x04 nothing', (tmp_path/'run/map.npz').read_bytes()[:900]):
        (tmp_path/'run/map.npz').write_bytes(spoil)
        again()
        assert asked==['map_points','cluster','find_outliers','find_duplicates']
        assert again() and asked==[]
    write(file, blobs(seed=1)[0])
    os.utime(file, ns=(1,1)) # even if it looks older
    assert (again().xy!=first.xy).any() and len(asked)==4
    assert sorted(o.name for o in file.parent.iterdir())==['features.parquet','map.npz']

def test_another_method_is_another_map(tmp_path, request):
    file = write(tmp_path/'run/features.parquet', blobs()[0])
    m = ImageMap(file)
    m.compute()
    request.getfixturevalue('umap')
    other = ImageMap(file)
    other.compute()
    assert (m.how,other.how)==('t-SNE','UMAP') and (m.xy!=other.xy).any()

def test_it_says_what_went_wrong(tmp_path, monkeypatch):
    file = write(tmp_path/'features.parquet', blobs()[0])
    def broken(*args, **kwargs): raise ValueError('too few of them')
    monkeypatch.setattr(image_map, 'cluster', broken)
    m = ImageMap(file)
    m.compute()
    assert m.notes==['No clusters: too few of them'] and 'cluster' not in m.columns and 'duplicate' in m.columns and m.xy is not None
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(image_map, '_keep', full)
    m = ImageMap(file)
    m.compute()
    assert 'map.npz cannot be written (No space left on device)' in m.notes[-1] and not m.error
    (tmp_path/'map.npz').unlink()
    monkeypatch.setattr(image_map, 'map_points', broken)
    m = ImageMap(file)
    with pytest.raises(ValueError): m.compute()
    assert m.info()['error']=='ValueError: too few of them' and m.info()['doing']==''

# Answers

def test_near(tmp_path):
    x = np.random.default_rng(5).normal(size=(60,7)).astype(np.float32)*np.linspace(.01, 50, 60)[:,None].astype(np.float32)
    m,sim = ImageMap(write(tmp_path/'features.parquet', x)),cosines(x)
    np.fill_diagonal(sim, -9)
    for i in range(60):
        got = m.near(i)
        assert got['ids']==np.argsort(-sim[i])[:12].tolist() and np.abs(np.array(got['similarity'])-sim[i][got['ids']]).max()<1e-4
    assert len(m.near(0, k=500)['ids'])==59
    assert ImageMap(write(tmp_path/'one.parquet', x[:1])).near(0)==dict(ids=[], similarity=[])

def test_half_precision(tmp_path):
    x = blobs()[0]
    a,b = (ImageMap(write(tmp_path/f'{o}.parquet', x.astype(o))) for o in ('float16','float32'))
    assert a.x.dtype==torch.float32 and (a.x-b.x).abs().max()<1e-2 and (a.x.norm(dim=1)-1).abs().max()<1e-6

def test_cards(tmp_path):
    x,groups = blobs()
    thumbs = [jpeg((i,0,0)) for i in range(90)]
    m = ImageMap(write(tmp_path/'features.parquet', x, [*map(str, groups)], thumbs, sizes=[(i+1,500) for i in range(90)], rows=7))
    m.compute()
    for ids in ([3], [89,0,44,3], [5,5]):
        cards = cards_of(m.cards(ids))
        assert [o['id'] for o in cards]==ids and [o['thumb'] for o in cards]==[thumbs[i] for i in ids]
        for i,o in zip(ids, cards):
            assert (o['path'], o['label'], o['width'], o['height'], o['cluster'])==(f'{i:05}.png', str(groups[i]), i+1, 500, int(m.columns['cluster'][i]))

def test_few_thumbnails_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(image_map, '_max_kept', 5)
    thumbs = [jpeg((i,0,0)) for i in range(90)]
    m = ImageMap(write(tmp_path/'features.parquet', blobs()[0], None, thumbs))
    for ids in (range(0, 20), range(3, 9), [8,0,89]):
        assert m.thumbnails(list(ids))==[thumbs[i] for i in ids] and len(m._thumbs)==5

@pytest.mark.parametrize('with_root', [True,False])
def test_thumbnails_of_the_images(tmp_path, with_root, monkeypatch):
    root = tmp_path/'photos'
    root.mkdir()
    Image.new('RGB', (400,200), (200,10,10)).save(root/'a b.png')
    Image.new('L', (20,30), 77).save(root/'ü.png')
    Image.fromarray(np.full((50,50), 40000, np.uint16)).save(root/'deep.png')
    (root/'bad.png').write_bytes(b'text')
    names = ['a b.png','ü.png','deep.png','bad.png','gone.png']
    file = write(tmp_path/'run/features.parquet', np.eye(5, dtype=np.float32), root=root if with_root else None, paths=names if with_root else [str(root/o) for o in names])
    m = ImageMap(file)
    thumbs = m.thumbnails([*range(5)])
    ims = [Image.open(io.BytesIO(o)) for o in thumbs[:3]]
    assert [o.size for o in ims]==[(96,48),(20,30),(50,50)] and thumbs[3:]==[b'',b'']
    assert np.abs(np.asarray(ims[0].convert('RGB'))[20,20].astype(int)-[200,10,10]).max()<6 and abs(int(np.asarray(ims[2].convert('L'))[9,9])-40000//257)<4
    for o in root.iterdir(): o.unlink()
    assert m.thumbnails([1,0])==[thumbs[1],thumbs[0]] # made once

def test_save(tmp_path, monkeypatch):
    x = np.eye(4, dtype=np.float32)
    m = ImageMap(write(tmp_path/'run/features.parquet', x, root='/photos/all', paths=['a/1.png','b/ü 2.png','c.png','d.png']))
    (tmp_path/'run/selected-2.txt').write_text('mine\n')
    monkeypatch.chdir(tmp_path)
    assert [m.save(o) for o in ([3,1],[0],[2])]==[tmp_path/f'run/selected-{i}.txt' for i in (1,3,4)]
    assert (tmp_path/'run/selected-1.txt').read_text(encoding='utf-8')=='/photos/all/d.png\n/photos/all/b/ü 2.png\n' and (tmp_path/'run/selected-2.txt').read_text()=='mine\n'
    m = ImageMap(write(tmp_path/'run/features.parquet', x, root='photos'))
    assert m.save([0]).read_text()==f'{tmp_path}/photos/00000.png\n' # a relative root is one of the folder that the command runs in

# Prototypes, of a run

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of a method with prototypes"
    path = tmp_path_factory.mktemp('run')
    for i in range(16):
        (path/'photos').mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32,32), dtype=np.uint8)).save(path/f'photos/{i:02}.png')
    cli.ssl_pretrain(path/'photos', 'swav_small', out=path/'run', n_in=1, arch='test_mambaout', low_resolution=False, hidden_size=16, bs=8, warmup_epochs=0., n_protos=5, workers=0, epochs=1)
    return path/'run'

def test_prototypes(run, tmp_path):
    model = learner_of(run)[0].model.eval()
    dim = model.projector[0].in_features
    x = np.random.default_rng(7).normal(size=(40,dim)).astype(np.float32)*3
    file = write(run/'features.parquet', x)
    try:
        assert find_features(run)==file
        m = cli_explore._open_map(file)
        deadline = time.time()+60
        while m.doing and time.time()<deadline: time.sleep(.05)
        with torch.no_grad(): sim = F.normalize(model.projector(torch.as_tensor(x)), dim=1)@F.normalize(model.prototypes.weight, dim=1).T
        assert m.notes==[] and m.columns['prototype'].tolist()==sim.argmax(1).tolist()
        for o in m.groups['prototype']:
            own = [i for i in range(40) if sim[i].argmax()==o['number']]
            assert o['ids']==sorted(own, key=lambda i: -float(sim[i].max()))[:8]
        m = ImageMap(write(tmp_path/'features.parquet', x[:,:dim-1]), lambda: cli_explore._prototypes(run)) # of another encoder
        m.compute()
        assert len(m.notes)==1 and m.notes[0].startswith('No prototypes: ') and 'prototype' not in m.columns and 'duplicate' in m.columns
    finally:
        for o in ('features.parquet','map.npz'): (run/o).unlink(missing_ok=True)

def test_a_method_without_prototypes(tmp_path):
    from self_supervised.pictures import prototype_scores
    from self_supervised.vision.simclr import create_simclr_model
    model = create_simclr_model(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    m = ImageMap(write(tmp_path/'features.parquet', blobs(dim=8)[0]), lambda: prototype_scores(model))
    m.compute()
    assert m.notes[0].startswith('No prototypes: the model (SimCLRModel) has no `prototypes`') and 'prototype' not in m.info()['columns']

# The command

def test_which_page(tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr('self_supervised.explore.serve', lambda *args: served.append(args))
    Image.new('RGB', (40,40)).save(tmp_path/'a.png')
    ssl_explore(str(tmp_path), 64, 8600, False)
    assert served.pop()==(str(tmp_path), 64, 8600, False)
    ssl_explore(browser=False)
    assert served.pop()==(None, 256, None, False)
    names = [f'{i:02}.png' for i in range(40)]
    for o in names[::2]: Image.new('RGB', (40,40)).save(tmp_path/o)
    (tmp_path/names[0]).write_bytes(b'text')
    file = write(tmp_path/'run/features.parquet', np.eye(40, dtype=np.float32), root=tmp_path, paths=names)
    for o in (tmp_path/'run', file):
        ssl_explore(str(o), 64, 8600, False)
        files,size,port,browser,routes = served.pop()
        assert 5<len(files)<=16 and all(f.parent==tmp_path and f.name in names[2::2] for f in files) and (size,port,browser)==(64,8600,False) and routes()
    ssl_explore(str(write(tmp_path/'other/features.parquet', np.eye(9, dtype=np.float32), root='gone')), browser=False)
    assert served.pop()[0]==[]

def test_run_without_features(run, tmp_path):
    for o in (run, str(run)):
        with pytest.raises(ValueError, match=re.escape(f'{run} is the folder of a run without features.parquet, which the map is made of: ssl_embed {run} photos makes it')): ssl_explore(o)
    (tmp_path/'checkpoints').mkdir()
    assert find_features(tmp_path) is None
    (tmp_path/'checkpoints/1.ckpt').touch()
    with pytest.raises(ValueError, match='without features.parquet'): find_features(tmp_path)

# The server

@contextlib.contextmanager
def explorer(folder, home):
    "A started `ssl_explore` of a folder"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    with open(home/'log', 'w') as log:
        p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', 'from self_supervised.cli import ssl_explore; ssl_explore()', str(folder), '--no-browser', '--port', str(port)],
                             stdout=log, stderr=log, cwd=home, env={**os.environ, 'HOME':str(home), 'OMP_NUM_THREADS':'1'})
    p.url,p.port,p.log = f'http://127.0.0.1:{port}',port,(home/'log').read_text
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if ask(p, 'GET', '/map/info')[0]==200: break
            assert p.poll() is None, p.log()
            time.sleep(.1)
        yield p
    finally:
        p.terminate()
        p.wait(20)

def ask(server, method, path, body=None, **headers):
    "Status, headers and content of an answer; `headers` replace those of a page of the server, None leaves one out"
    host = f'127.0.0.1:{server.port}'
    headers = {'Host':host, **({'Origin':f'http://{host}', 'Content-Type':'application/json'} if method=='POST' else {}), **{k.replace('_','-'):v for k,v in headers.items()}}
    c = http.client.HTTPConnection('127.0.0.1', server.port, timeout=20)
    try:
        c.putrequest(method, path, skip_host=True)
        for k,v in headers.items():
            if v is not None: c.putheader(k, v)
        if body is not None: c.putheader('Content-Length', str(len(body)))
        c.endheaders(body)
        r = c.getresponse()
        return r.status,dict(r.headers),r.read()
    finally: c.close()

colours = (220,60,50),(40,150,60),(50,80,210)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A run with 90 images in three groups; 5 is a copy of 4"
    path = tmp_path_factory.mktemp('explored')
    x,groups = blobs()
    x[5] = x[4]
    names = [f'{"rgb"[g]}/<b>{i:02}.png' for i,g in enumerate(groups)]
    for nm,g in zip(names, groups):
        (path/'photos'/nm).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (48,32), colours[g]).save(path/'photos'/nm)
    write(path/'run/features.parquet', x, [['<i>red','green','blue'][g] for g in groups], [jpeg(colours[g]) for g in groups], path/'photos', names)
    return path/'run'

@pytest.fixture(scope='module')
def server(folder, tmp_path_factory):
    with explorer(folder, tmp_path_factory.mktemp('home')) as p:
        while json.loads(ask(p, 'GET', '/map/info')[2])['doing']: time.sleep(.1)
        yield p

def test_answers(server, folder):
    m = ImageMap(folder/'features.parquet')
    m.compute()
    assert 'image map is at http://127.0.0.1' in server.log()
    assert json.loads(ask(server, 'GET', '/map/info')[2])==m.info()
    assert ask(server, 'GET', '/map/points')[2]==m.xy.astype('<f4').tobytes()
    for k,o in m.columns.items():
        assert ask(server, 'GET', f'/map/column/{k}')[2]==o.astype('<i4').tobytes() and json.loads(ask(server, 'GET', f'/map/groups/{k}')[2])==m.groups[k]
    assert json.loads(ask(server, 'GET', '/map/near/7')[2])==m.near(7)
    assert cards_of(ask(server, 'GET', '/map/cards?ids=7,0,89')[2])==cards_of(m.cards([7,0,89]))
    for path,kind in (('/','text/html'), ('/map/page.js','text/javascript'), ('/map/page.css','text/css')):
        status,headers,body = ask(server, 'GET', path)
        assert status==200 and headers['content-type'].startswith(kind) and "default-src 'none'" in headers['content-security-policy'] and body
    assert ask(server, 'GET', '/views/_stcore/health')[0]==200

@pytest.mark.parametrize('path', ['near/90', 'near/-1', 'near/1e1', 'near/٣', 'near/x', 'near/999999999999999', 'column/path', 'column/..', 'groups/nothing', 'cards?ids=', 'cards?ids=1,,2', 'cards?ids=1;2',
                                  'cards?ids=90', 'cards', 'cards?ids='+','.join(['1']*201), '../features.parquet', 'features.parquet'])
def test_wrong_paths(server, path):
    from urllib.parse import quote
    status,_,body = ask(server, 'GET', '/map/'+quote(path, safe='/?=,;.'))
    assert status in (400,404) and b'Traceback' not in body and len(body)<500

def test_loopback_only(server):
    assert {o.laddr.ip for o in psutil.Process(server.pid).net_connections('inet') if o.status==psutil.CONN_LISTEN}=={'127.0.0.1'}

everything = '/','/map/page.js','/map/page.css','/map/info','/map/points','/map/column/cluster','/map/groups/cluster','/map/cards?ids=1','/map/near/1'

def test_others_are_refused(server, folder):
    port = server.port
    strangers = [dict(Host=o) for o in ('elsewhere.example', f'elsewhere.example:{port}', f'127.0.0.1:{port+1}', '127.0.0.1', f'127.0.0.1.elsewhere.example:{port}', f'0.0.0.0:{port}')] + \
                [dict(Origin=o) for o in ('http://elsewhere.example', f'http://127.0.0.1:{port+1}', f'https://127.0.0.1:{port}', 'null', '')] + [dict(Sec_Fetch_Site=o) for o in ('cross-site','same-site')]
    for path in everything:
        assert ask(server, 'GET', path)[0]==200 and ask(server, 'GET', path, Host=f'localhost:{port}')[0]==200, path
        for o in strangers: assert ask(server, 'GET', path, **o)[0]==403, (path,o)
        assert ask(server, 'GET', path, Sec_Fetch_Site='cross-site', Sec_Fetch_Mode='navigate')[0]==(200 if path=='/' else 403) # a link to the page may be followed
    body = b'{"ids":[1]}'
    for o in [*strangers, dict(Origin=None), dict(Origin=f'http://localhost:{port}')]: assert ask(server, 'POST', '/map/save', body, **o)[0]==403, o
    assert ask(server, 'GET', '/map/save')[0]==405 and ask(server, 'POST', '/map/info', body)[0]==405
    assert not list(folder.glob('selected-*'))

@pytest.mark.parametrize('body,status', [(b'', 400), (b'ids', 400), (b'[1]', 400), (b'{"ids":[]}', 400), (b'{"ids":1}', 400), (b'{"ids":[1,1]}', 400), (b'{"ids":[90]}', 400), (b'{"ids":[-1]}', 400),
                                         (b'{"ids":[true]}', 400), (b'{"ids":["1"]}', 400), (b'{"ids":[1.0]}', 400), (b'{"ids":["../../x"]}', 400), (b'{"ids":['+b' '*5000+b'1]}', 413)])
def test_wrong_lists(server, folder, body, status):
    assert ask(server, 'POST', '/map/save', body)[0]==status and not list(folder.glob('selected-*'))

@pytest.mark.parametrize('port', [80,8501])
def test_refused_by_port(port):
    for host,ok in ((f'localhost:{port}',True), ('localhost',port==80), ('[::1]:8501',False), ('',False), (None,False)):
        assert (refused({} if host is None else {'host':host}, port) is None)==ok

# The page

def wait(page, what, arg=None, seconds=30):
    "Until the script `what` gives something true; the page allows no scripts as text, which Playwright's own waiting is"
    for _ in range(seconds*20):
        if res := page.evaluate(what, arg): return res
        page.wait_for_timeout(50)
    raise AssertionError(f'{what} is not so after {seconds} seconds')

@contextlib.contextmanager
def opened(browser, server, *args, **kwargs): # noqa: F811
    with new_page(browser, server.url, *args, **kwargs) as page:
        wait(page, '() => xy && !info.doing && columns.duplicate && !document.querySelector("#duplicate").disabled')
        yield page

def where(page, i):
    "Image `i` on the screen"
    box,(x,y) = page.locator('#map').bounding_box(),page.evaluate('i => toScreen(i)', i)
    return box['x']+x,box['y']+y

def pixel(page, x, y):
    "The colour of the page at a place"
    a = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert('RGB'))
    return a[round(y),round(x)].astype(int)

def alone(page, ids):
    "One of the images `ids` that no other image is near to on the screen"
    at = np.array([where(page, i) for i in range(page.evaluate('n'))])
    return max(ids, key=lambda i: np.sort(np.hypot(*(at-at[i]).T))[1])

@in_browser
def test_hover_and_click(browser, server, folder): # noqa: F811
    x = blobs()[0]
    x[5] = x[4]
    with opened(browser, server) as page:
        assert page.title()=='Image map' and page.locator('#name').inner_text()=='run, 90 images'
        i = alone(page, range(40, 70))
        page.mouse.move(*where(page, i))
        page.locator('#tip').wait_for(state='visible')
        assert page.locator('#tip').inner_text().splitlines()[:2]==[f'g/<b>{i:02}.png','green'] and '48 × 32 pixels' in page.locator('#tip').inner_text() # and no HTML of a name
        img = page.locator('#tip img')
        wait(page, '() => document.querySelector("#tip img").naturalWidth==48')
        box = img.bounding_box()
        assert np.abs(pixel(page, box['x']+box['width']/2, box['y']+box['height']/2)-colours[1]).max()<8
        page.mouse.move(*[o+3 for o in page.locator('#map').bounding_box().values()][:2])
        page.locator('#tip').wait_for(state='hidden')

        sim = cosines(x)
        np.fill_diagonal(sim, -9)
        def shown(): return page.locator('#near .tile').evaluate_all('os => os.map(o => o.image)')
        page.mouse.click(*where(page, i))
        page.locator('#near').wait_for()
        assert shown()==np.argsort(-sim[i])[:12].tolist() and page.locator('#image h2').inner_text()==f'g/<b>{i:02}.png'
        assert page.locator('#near .tile').all_inner_texts()==[f'{o:.2f}' for o in np.sort(sim[i])[:-13:-1]]
        wait(page, '() => [...document.querySelectorAll("#near img, #image .big img")].every(o => o.naturalWidth==48 && o.alt)')
        j = shown()[3]
        page.locator('#near .tile').nth(3).click() # from there to its neighbours
        wait(page, 'j => document.querySelector("#image h2").textContent.includes(j)', f'{j:02}.png')
        assert shown()==np.argsort(-sim[j])[:12].tolist()
        page.keyboard.press('Escape')
        assert page.locator('#image').is_hidden()

def loop_around(page, ids, margin=14):
    "Corners of a loop on the screen around images: the hull of circles around them"
    from scipy.spatial import ConvexHull
    at = np.concatenate([np.array(where(page, i))+margin*np.array([(math.cos(a), math.sin(a)) for a in np.arange(0, 6.28, .4)]) for i in ids])
    return at[ConvexHull(at).vertices]

def draw(page, corners):
    page.mouse.move(*corners[0])
    page.mouse.down()
    for o in corners[1:]: page.mouse.move(*o, steps=3)
    page.mouse.up()
    page.locator('#selection').wait_for()

@in_browser
def test_lasso(browser, server, folder): # noqa: F811
    groups = blobs()[1]
    with opened(browser, server) as page:
        want = np.flatnonzero(groups==0).tolist()
        loop = loop_around(page, want)
        inside = Polygon(loop).contains_points([where(page, i) for i in range(90)])
        assert np.flatnonzero(inside).tolist()==want # the groups lie apart
        page.keyboard.down('Shift')
        draw(page, loop)
        page.keyboard.up('Shift')
        assert page.locator('#selection h2').inner_text()=='40 images selected' and page.locator('#selection .tile').evaluate_all('os => os.map(o => o.image)')==want
        page.get_by_role('button', name='Save list').click()
        page.locator('#saved:not(:empty)').wait_for()
        assert page.locator('#saved').inner_text()==f'The paths of 40 images are in {folder/"selected-1.txt"}'
        try: assert (folder/'selected-1.txt').read_text().splitlines()==[str(folder.parent/f'photos/r/<b>{i:02}.png') for i in want]
        finally: (folder/'selected-1.txt').unlink()
        page.keyboard.press('Escape')
        assert page.locator('#selection').is_hidden() and not page.evaluate('line || chosen || mask')

        page.get_by_label('Lasso').check() # with the switch; after moving and zooming; with corners that turn inwards
        page.locator('#map').hover()
        page.mouse.wheel(0, -200)
        wait(page, '() => view.s>fit*1.2')
        zoomed = page.evaluate('view')
        star = [(500+math.cos(a)*r, 480+math.sin(a)*r) for a,r in zip(np.arange(0, 6.28, .5), [400,150]*7)]
        draw(page, star)
        want = np.flatnonzero(Polygon(star).contains_points([where(page, i) for i in range(90)])).tolist()
        assert 0<len(want)<90 and page.evaluate('chosen')==want and page.evaluate('view')==zoomed
        page.get_by_role('button', name='Clear').click()
        page.get_by_label('Lasso').uncheck()
        page.mouse.move(500, 400)
        page.mouse.down()
        page.mouse.move(560, 430, steps=4)
        page.mouse.up()
        moved = page.evaluate('view')
        assert moved['x']<zoomed['x'] and moved['y']>zoomed['y'] and moved['s']==zoomed['s'] and page.locator('#selection').is_hidden()
        page.get_by_role('button', name='All images').click()
        assert page.evaluate('view')=={'x':.5, 'y':.5, 's':page.evaluate('fit')}

@in_browser
def test_wheel_keeps_the_place(browser, server): # noqa: F811
    with opened(browser, server) as page:
        for by in (-300,120,-500):
            before = page.evaluate('toMap(300, 200)')
            box = page.locator('#map').bounding_box()
            page.mouse.move(box['x']+300, box['y']+200)
            s = page.evaluate('view.s')
            page.mouse.wheel(0, by)
            wait(page, 's => view.s!=s', s)
            assert np.abs(np.array(page.evaluate('toMap(300, 200)'))-before).max()<1e-3 and (page.evaluate('view.s')>s)==(by<0)

@in_browser
def test_colours_and_switches(browser, server, folder): # noqa: F811
    m = ImageMap(folder/'features.parquet')
    m.compute()
    with opened(browser, server) as page:
        def listed(): return page.locator('#groups .group b').all_inner_texts()
        assert page.get_by_label('Cluster').is_checked() and listed()==[f'Cluster {o["number"]+1}' for o in m.groups['cluster']]
        page.get_by_label('Label').check()
        wait(page, '() => document.querySelector("#groups h2").textContent=="Labels"')
        assert listed()==['<i>red','green','blue'] and page.locator('#groups li').first.locator('.tile').evaluate_all('os => os.map(o => o.image)')==m.groups['label'][0]['ids']
        seen = {}
        for g in (0,1,2):
            number = [o['number'] for o in m.groups['label']][g]
            i = alone(page, np.flatnonzero(m.columns['label']==number).tolist())
            swatch = page.locator('#groups .group i').nth(g).evaluate('o => getComputedStyle(o).backgroundColor')
            seen[g] = np.array(list(map(int, re.findall(r'\d+', swatch))))
            page.mouse.move(5, 300)
            assert np.abs(pixel(page, *where(page, i))-(seen[g]*.88+255*.12)).max()<12 # the points have the colour of the list
        assert min(np.abs(seen[a]-seen[b]).max() for a,b in ((0,1),(0,2),(1,2)))>40
        page.locator('#groups .group').nth(1).click() # one group alone
        assert np.flatnonzero(page.evaluate('[...mask]')).tolist()==np.flatnonzero(m.columns['label']==m.groups['label'][1]['number']).tolist()
        page.keyboard.press('Escape')
        assert page.evaluate('mask') is None
        page.get_by_label('None').check()
        wait(page, '() => !document.querySelector("#groups h2")')

        drawn_pixels = '() => ctx.getImageData(0, 0, map.width, map.height).data.reduce((n, o, i) => n+(i%4==3 && o>0), 0)' # above the points
        def drawn(): return page.evaluate(drawn_pixels)
        wait(page, '() => !frame')
        assert drawn()==0
        for name,kind,n in (('Duplicates','duplicate',int((m.columns['duplicate']>=0).sum())), ('Outliers','outlier',1)):
            box = page.get_by_label(name)
            assert page.locator(f'#{kind} + span').inner_text()==str(n)
            box.check()
            page.get_by_role('heading', name=name).wait_for()
            wait(page, '() => !frame')
            some = drawn()
            assert some>0 and page.locator('#groups .tile').evaluate_all('os => os.map(o => o.image)')==sum((o['ids'] for o in m.groups[kind]), [])
            box.uncheck()
            wait(page, '() => !frame && !document.querySelector("#groups h2")')
            assert drawn()==0
        page.get_by_label('Thumbnails').check()
        wait(page, f'() => ({drawn_pixels})()>5000')
        i = int(np.argmin(m.xy[:,0])) # the left-most: in its field is an image of its group
        a = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert('RGB')).astype(int)
        x,y = map(round, where(page, i))
        near = a[max(0, y-45):y+45,max(0, x-45):x+45].reshape(-1,3)
        assert (np.abs(near-colours[blobs()[1][i]]).max(1)<10).sum()>100

@in_browser
@pytest.mark.parametrize('scheme,dark', [('light',False), ('dark',True)])
def test_schemes(browser, server, scheme, dark): # noqa: F811
    with opened(browser, server, color_scheme=scheme) as page:
        a = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert('L')).astype(float)
        assert (np.median(a[:,:900])<60, np.median(a[:,1050:])<60)==(dark,dark)
        page.emulate_media(color_scheme='light' if dark else 'dark') # changed while it is open
        wait(page, '() => !frame')
        page.wait_for_timeout(100)
        a = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert('L')).astype(float)
        assert (np.median(a[:,:900])<60)!=dark

@in_browser
def test_phone(browser, server): # noqa: F811
    with opened(browser, server, 390, 800, has_touch=True, is_mobile=True, device_scale_factor=2) as page:
        assert page.evaluate('document.documentElement.scrollWidth')<=390 and page.evaluate('[map.width, width]')==[780,390]
        i = alone(page, range(40, 70))
        page.touchscreen.tap(*where(page, i))
        page.locator('#near').wait_for()
        assert page.locator('#image h2').inner_text().startswith('g/<b>') and page.evaluate('document.documentElement.scrollWidth')<=390
        assert page.locator('#image').bounding_box()['y']<page.locator('#controls').bounding_box()['y']<page.locator('#groups').bounding_box()['y']
        cdp,box = page.context.new_cdp_session(page),page.locator('#map').bounding_box() # two fingers
        cx,cy,s = box['x']+150,box['y']+150,page.evaluate('view.s')
        def touch(kind, d, by=0): cdp.send('Input.dispatchTouchEvent', dict(type=kind, touchPoints=[dict(x=cx-d+by, y=cy-by, id=0), dict(x=cx+d+by, y=cy-by, id=1)] if d else []))
        middle = page.evaluate('toMap(150, 150)')
        touch('touchStart', 30)
        for d in (40,50,60): touch('touchMove', d)
        touch('touchEnd', 0)
        assert page.evaluate('view.s')==pytest.approx(2*s, rel=.1) and np.abs(np.array(page.evaluate('toMap(150, 150)'))-middle).max()<.02
        s,middle = page.evaluate('view.s'),page.evaluate('toMap(150, 150)') # both to the right, and up
        touch('touchStart', 40)
        for by in (10,20,30,40,50): touch('touchMove', 40, by)
        touch('touchEnd', 0)
        assert page.evaluate('view.s')==pytest.approx(s, rel=.1) and np.abs(np.array(page.evaluate('toMap(200, 100)'))-middle).max()*s<12
        assert page.locator('#selection').is_hidden()

@in_browser
def test_keyboard(browser, server): # noqa: F811
    with opened(browser, server) as page:
        page.locator('#map').focus()
        s = page.evaluate('view.s')
        page.keyboard.press('+')
        page.keyboard.press('ArrowRight')
        assert page.evaluate('view.s')>s and page.evaluate('view.x')>.5
        page.keyboard.press('0')
        assert page.evaluate('view.s')==s and page.evaluate('view.x')==.5
        assert page.locator('#map').get_attribute('aria-label') and page.get_by_role('status').count()>=1

@in_browser
def test_views_are_the_second_page(browser, server, folder): # noqa: F811
    with new_page(browser, server.url) as page:
        page.wait_for_load_state('networkidle') # what is asked for when the page is left would be a failed request
        page.get_by_role('link', name='View explorer').click()
        page.get_by_text('What the encoder gets').wait_for()
        assert page.url==f'{server.url}/views/' and 'photos/r/<b>00.png' in page.locator('[data-testid=stCode]').inner_text()
    for origin,status in (('http://elsewhere.example',403), (server.url,101)):
        with socket.create_connection(('127.0.0.1', server.port), timeout=20) as s:
            s.sendall(f'GET /views/_stcore/stream HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nOrigin: {origin}\r\n'
                      'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n'.encode())
            assert s.recv(60).startswith(f'HTTP/1.1 {status}'.encode())

@in_browser
def test_it_says_what_it_does(browser, tmp_path): # noqa: F811
    "While the points are found the page is there and says so; a server that has ended is named"
    slow = tmp_path/'slow'
    slow.mkdir() # a method of layout that waits until it is told to go on
    (slow/'umap.py').write_text(f'import time, pathlib\nclass UMAP:\n    def __init__(self, **how): pass\n    def fit_transform(self, x):\n        while not pathlib.Path({str(tmp_path/"go")!r}).exists(): time.sleep(.05)\n        return x[:,:2]\n')
    write(tmp_path/'run/features.parquet', blobs()[0])
    before = os.environ.get('PYTHONPATH', '')
    os.environ['PYTHONPATH'] = f'{slow}:{before}'
    try:
        with explorer(tmp_path/'run', tmp_path) as p, new_page(browser, p.url, check=False) as page:
            page.get_by_text('Laying out 90 images …').wait_for()
            assert page.evaluate('xy') is None and ask(p, 'GET', '/map/points')[0]==404
            (tmp_path/'go').touch()
            wait(page, '() => xy && !info.doing && !document.querySelector("#doing").textContent')
            assert page.locator('#how').inner_text()=='UMAP' and not page.troubles
            page.evaluate('info.doing = "x"; setTimeout(refresh, 1500)')
            p.terminate()
            page.get_by_text('The server does not answer').wait_for()
    finally: os.environ['PYTHONPATH'] = before

@in_browser
def test_many_images(browser, tmp_path): # noqa: F811
    "50,000: the picture, the right neighbours, the right one under the pointer, and a lasso around a thousand"
    n,r = 50_000,np.random.default_rng(0)
    groups = r.integers(0, 12, n)
    x  = (r.normal(size=(12,128))[groups]+r.normal(size=(n,128))*.7).astype(np.float16)
    xy = np.float32([.5,.5]+np.c_[np.cos(groups*.52),np.sin(groups*.52)]*.4+np.clip(r.normal(size=(n,2)), -3, 3)*.025)
    thumbs = [jpeg((20*g,90,200-15*g), (8,8)) for g in range(12)]
    file = write(tmp_path/'run/features.parquet', x, [f'class {g}' for g in groups], [thumbs[g] for g in groups], rows=5000)
    marks = np.full(n, -1, np.int32)
    np.savez(tmp_path/'run/map.npz', key=ImageMap(file).key, xy=xy, why='', cluster=groups.astype(np.int32), outlier=marks, duplicate=marks)
    with explorer(tmp_path/'run', tmp_path) as p, opened(browser, p) as page:
        a = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert('RGB')).astype(int)[60:,:1000]
        assert 10_000<(np.abs(a-255).max(2)>40).sum() # there is a picture
        sim = x.astype(np.float64)
        sim /= np.linalg.norm(sim, axis=1, keepdims=True)
        at  = np.array(page.evaluate('[...xy]')).reshape(-1,2)
        places = r.uniform(0, 1, (400,2))
        gaps,reach = (((places[:,None]-at)**2).sum(-1))**.5,page.evaluate('12/view.s')
        assert page.evaluate('([os,r]) => os.map(([x,y]) => nearest(x, y, r))', [places.tolist(),reach])==[int(o.argmin()) if o.min()<reach else -1 for o in gaps]
        assert 100<(gaps.min(1)<reach).sum()<390
        box = page.locator('#map').bounding_box()
        for target in (17,49_999):
            place = page.evaluate('i => toScreen(i).map(o => o+1)', target)
            assert page.evaluate('o => nearest(...toMap(...o), 12/view.s)', place)==((at-page.evaluate('o => toMap(...o)', place))**2).sum(1).argmin()
            page.mouse.click(box['x']+place[0], box['y']+place[1])
            wait(page, '() => picked>=0 && near.length==12')
            i = page.evaluate('picked') # what is there under a whole pixel
            own = sim@sim[i]
            own[i] = -9
            got = page.evaluate('near')
            assert np.abs(np.sort(own)[:-13:-1]-own[got]).max()<1e-4 and len(set(got))==12
            page.keyboard.press('Escape')
        loop = [(830+r*180*math.cos(o), 430+r*250*math.sin(o)) for o,r in zip(np.arange(0, 6.28, .2), [1,.5]*16)] # a star
        page.keyboard.down('Shift')
        draw(page, loop)
        page.keyboard.up('Shift')
        inside = Polygon(page.evaluate('line')).contains_points(at)
        corners = np.array([page.evaluate('o => toMap(...o)', [a-box['x'], b-box['y']]) for a,b in loop])
        assert inside.sum()>1000 and np.abs(inside.sum()-Polygon(corners).contains_points(at).sum())<.02*inside.sum()
        assert set(page.evaluate('chosen'))==set(np.flatnonzero(inside).tolist()) and page.locator('#selection .tile').count()==60
