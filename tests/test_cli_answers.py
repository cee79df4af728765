"Commands that answer questions about images, and README's chain from images to answers"
import csv, re, shlex, socket, subprocess, sys, time, urllib.request, warnings
from pathlib import Path

import numpy as np, pytest, torch
from fastai.vision.all import Learner
from PIL import Image

from self_supervised import cli
from self_supervised.all import SimCLR, create_encoder, create_simclr_model, get_simclr_aug_pipelines, image_dls
from self_supervised.embed import embed
from self_supervised.feature_table import read_features
from self_supervised.neighbors import find_duplicates, find_similar
from self_supervised.selection import select

pytest.importorskip('pyarrow')

def draw(fn, seed, size=(40,30), **kwargs):
    fn.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8,8,3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC).save(fn, **kwargs)

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "24 images in train/ and 8 in val/, of which two are copies of others, one larger and one smaller; and a damaged file"
    top = tmp_path_factory.mktemp('photos')
    for i in range(24): draw(top/'train'/'ab'[i%2]/f'{i:02}.png', i)
    for i in range(24, 30): draw(top/'val'/'ab'[i%2]/f'{i:02}.png', i)
    draw(top/'val'/'a'/'again.png', 4, (80,60))
    draw(top/'val'/'b'/'little.png', 7, (32,24))
    (top/'val'/'a'/'cut.png').write_bytes((top/'val'/'a'/'again.png').read_bytes()[:60])
    return top

@pytest.fixture(scope='module')
def table(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp('table')/'features.parquet'
    with pytest.warns(UserWarning, match='1 of 33 images could not be used'): cli.ssl_embed('random:resnet18', photos, out=out, labels=True, size=[28])
    return out

@pytest.fixture
def say(monkeypatch, capsys):
    "Run a command in this process: exit code, what it prints and what it says of mistakes"
    def _say(*words):
        monkeypatch.setattr(sys, 'argv', [str(o) for o in words])
        try: code = getattr(cli, words[0])()
        except SystemExit as e: code = e.code
        out = capsys.readouterr()
        return (1, out.out, out.err+code) if isinstance(code, str) else (code, out.out, out.err)
    return _say

def rows(path): return list(csv.DictReader(path.open(encoding='utf-8')))
def pictures(path): return re.findall(r'<figure title="(.*?)">.*?<figcaption>(.*?)</figcaption>', path.with_suffix('.html').read_text(), re.S)

def test_embed(photos, table, say, tmp_path, monkeypatch):
    x,df = read_features(table)
    assert len(x)==32 and df.path.tolist()==sorted(str(o.relative_to(photos)) for o in photos.rglob('*.png') if o.stem!='cut') and set(df.label)=={'a','b'}
    assert df.attrs['model']=='random:resnet18' and df.attrs['root']==str(photos) and df.attrs['size']==[28,28] and df.attrs['normalization']['mean'][0]==pytest.approx(.485)
    code,_,err = say('ssl_embed', 'random:resnet18', photos, '--out', table)
    assert code==1 and '--overwrite' in err
    for words,says in ((['random:resnet18', photos, '--out', tmp_path],'give the name of a file'), (['random:resnet18', photos/'none', '--out', tmp_path/'f.parquet'],'is not a folder'),
                       (['nothing', photos],'is not a folder of a run'), (['imagenet:', photos],'write imagenet:resnet50'), (['random:resnet18', photos, '--part', '0'],'must be 1 or more'), (['random:resnet18', 'a.tar', '--labels', '--out', tmp_path/'f.parquet'],'--labels is for folders')):
        code,_,err = say('ssl_embed', *words)
        assert code and says in err and 'Traceback' not in err
    monkeypatch.chdir(tmp_path)
    (tmp_path/'names.txt').write_text('\n'.join(str(photos/df.path[i]) for i in (3,1)))
    code,out,_ = say('ssl_embed', 'random:resnet18', 'names.txt', photos/'val'/'a'/'again.png', '--size', 28, 20, '--half', '--thumbnail', 0, '--stats', *'000111', '--bs', 2)
    y,dg = read_features('features.parquet') # here, as the encoder is no run
    assert not code and '3 images' in out and y.dtype==torch.float16 and dg.attrs['size']==[28,20] and dg.attrs['normalization']==dict(mean=[0,0,0], std=[1,1,1]) and 'label' not in dg
    assert sorted(Path(o).name for o in dg.path)==sorted([Path(df.path[3]).name, Path(df.path[1]).name, 'again.png'])

def test_duplicates(photos, table, tmp_path, say):
    with pytest.warns(UserWarning, match='groups of copies have images of several sets .train, val.'): out = cli.ssl_duplicates(table, threshold=.995, out=tmp_path/'d.csv')
    x,df = read_features(table)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        groups = find_duplicates(x, .995, (df.width*df.height).tolist(), [o.split('/')[0] for o in df.path])
    got = rows(out)
    assert [(int(o['group']),o['path'],o['keep']) for o in got]==[(n,str(photos/df.path[i]),'yes' if i==g[0] else 'no') for n,g in enumerate(groups, 1) for i in g]
    keep = {Path(o['path']).name:o['keep'] for o in got if o['set']}
    assert keep['again.png']=='yes' and keep['little.png']=='no' and keep['04.png']=='no' and keep['07.png']=='yes'
    assert all(o['cosine']=='' if o['keep']=='yes' else float(o['cosine'])>=.9949 for o in got)
    assert [p for p,_ in pictures(out)]==[o['path'] for o in got] and 'http' not in out.with_suffix('.html').read_text()

def test_copies_in_two_tables(photos, tmp_path):
    torch.manual_seed(0)
    encoder = create_encoder('resnet18', pretrained=False)
    for s in ('train','val'): embed(encoder, photos/s, tmp_path/f'{s}.parquet', size=28)
    with pytest.warns(UserWarning, match='several sets'): out = cli.ssl_duplicates([tmp_path/'train.parquet', tmp_path/'val.parquet'], threshold=.99)
    assert out==tmp_path/'duplicates.csv'
    first = {Path(o['path']).name:Path(o['set']).stem for o in rows(out) if o['group'] in ('1','2')}
    assert first=={'again.png':'val', '04.png':'train', 'little.png':'val', '07.png':'train'}
    assert {p for p,_ in pictures(out)}=={o['path'] for o in rows(out)}
    with pytest.raises(ValueError, match='different encoders or settings'): cli.ssl_duplicates([tmp_path/'train.parquet', embed(encoder, photos/'train', tmp_path/'other.parquet', size=20)])
    with pytest.raises(ValueError, match='different encoders or settings'): cli.ssl_duplicates([tmp_path/'train.parquet', embed(create_encoder('resnet18', pretrained=False), photos/'train', tmp_path/'twin.parquet', size=28)])

def test_similar(photos, table, tmp_path, say, monkeypatch):
    x,df = read_features(table)
    name = 'val/a/again.png'
    i    = df.path.tolist().index(name)
    monkeypatch.chdir(photos)
    for query in (name, str(photos/name)): # as it is in the table, and as a file
        out  = cli.ssl_similar(table, query, k=3, out=tmp_path/'s.csv')
        s,js = find_similar(x, i, 3)
        assert [(o['query'],o['rank'],o['cosine'],o['path']) for o in rows(out)]==[(query,str(r),f'{v:.4f}',df.path[j]) for r,(v,j) in enumerate(zip(s[0].tolist(), js[0].tolist()), 1)]
        assert rows(out)[0]['path']=='train/a/04.png'
        assert [p for p,_ in pictures(out)]==[str(photos/name), *(str(photos/o['path']) for o in rows(out))]
    code,_,err = say('ssl_similar', table, 'val/a/agin.png')
    assert code==1 and 'did you mean val/a/again.png' in err

def test_similar_to_an_image_that_is_not_there(photos, table, tmp_path, say):
    encoder = create_encoder('resnet18', pretrained=False)
    learn = Learner(image_dls(photos/'train', size=32, bs=8, num_workers=0), create_simclr_model(encoder, hidden_size=8, projection_size=8), cbs=SimCLR(get_simclr_aug_pipelines(32)))
    run = tmp_path/'run'; run.mkdir()
    learn.export_encoder(run/'encoder.safetensors')
    cli.ssl_embed(str(run), photos/'train', out=run/'features.parquet')
    draw(tmp_path/'new.jpg', 5, quality=95)
    out = cli.ssl_similar(run, [str(tmp_path/'new.jpg'), 'a/04.png'], k=2)
    assert out==run/'similar.csv'
    got = rows(out)
    assert got[0]['path']=='b/05.png' and float(got[0]['cosine'])>.99 and [o['query'] for o in got]==[str(tmp_path/'new.jpg')]*2+['a/04.png']*2
    (run/'encoder.safetensors').rename(run/'gone')
    code,_,err = say('ssl_similar', run, tmp_path/'new.jpg')
    assert code==1 and 'give --encoder' in err
    code,_,err = say('ssl_similar', run, tmp_path/'new.jpg', '--encoder', 'random:test_mambaout')
    assert code==1 and 'has other weights' in err and '--encoder' in err

def test_a_table_of_a_loader(photos, tmp_path):
    embed(create_encoder('resnet18', pretrained=False), image_dls(photos/'train', size=32, bs=8, num_workers=0).train, tmp_path/'features.parquet')
    assert len(rows(cli.ssl_similar(tmp_path/'features.parquet', str(photos/'train'/'a'/'04.png'), k=3)))==3
    with pytest.raises(ValueError, match='made of a loader'): cli.ssl_similar(tmp_path/'features.parquet', str(photos/'val'/'a'/'24.png'))

def test_select(photos, table, tmp_path, say):
    x,df = read_features(table)
    out = cli.ssl_select(table, n=5, out=tmp_path/'a.csv')
    assert [o['path'] for o in rows(out)]==[str(photos/df.path[i]) for i in select(x, 5).tolist()]==[p for p,_ in pictures(out)]
    more = cli.ssl_select(table, n=6, labelled=out, out=tmp_path/'b.csv')
    have = [df.path.tolist().index(str(Path(o['path']).relative_to(photos))) for o in rows(out)]
    assert [o['path'] for o in rows(more)]==[str(photos/df.path[i]) for i in select(x, 6, have).tolist()]
    (tmp_path/'names.txt').write_text('\n'.join(df.path[i] for i in have))
    assert rows(cli.ssl_select(table, n=6, labelled=tmp_path/'names.txt', out=tmp_path/'c.csv'))==rows(more)
    far = cli.ssl_select(table, n=4, how='k-centre', out=tmp_path/'d.csv')
    assert [o['path'] for o in rows(far)]==[str(photos/df.path[i]) for i in select(x, 4, how='k-centre').tolist()]
    (tmp_path/'wrong.txt').write_text(str(photos/'val'/'a'/'cut.png'))
    for words,says in ((['--n','33'],'there are 32 images without a label'), (['--labelled',tmp_path/'none.txt'],'cannot be read'), (['--labelled',tmp_path/'wrong.txt'],'1 of 1 images are not in'), (['--out',tmp_path/'a.txt'],'must end with .csv')):
        code,_,err = say('ssl_select', table, *words)
        assert code==1 and says in err

def test_a_page_has_a_limit(tmp_path):
    from self_supervised.gallery import write_gallery
    many = [(f'{i}', [(b'x', '', f'{i}.{k}') for k in range(3)]) for i in range(10)]
    text = write_gallery(tmp_path/'a.html', 'a', 'b', many, most=9).read_text()
    assert text.count('<figure')==9 and '7 more, not shown' in text
    text = write_gallery(tmp_path/'a.html', 'a', 'b', [('', many[0][1]*10)], most=7).read_text()
    assert text.count('<figure')==7 and '23 more, not shown' in text

# README's chain

def test_the_chain_of_the_readme(project, tmp_path, monkeypatch, capsys):
    "Its commands in a row, as they are written, on a folder of images; the settings are those of a small run"
    text  = (project/'README.md').read_text(encoding='utf-8')
    lines = next(o for o in re.findall(r'```sh\n(.*?)```', text, re.S) if 'ssl_embed' in o).splitlines()
    assert [o.split()[0] for o in lines]==['ssl_pretrain','ssl_embed','ssl_duplicates','ssl_similar','ssl_select','ssl_explore','ssl_labels']
    monkeypatch.chdir(tmp_path)
    images = Path('path/to/images')
    for i in range(120): draw(images/f'{i:03}.jpg', i, (60,45) if i%2 else (45,60), quality=95)
    draw(images/'again.jpg', 3, (60,45), quality=80)
    (images/'000.jpg').rename(images/'chair.jpg')
    for s,n in (('train',8),('val',4)):
        for i in range(n*2): draw(Path('path/to/labelled')/s/'ab'[i%2]/f'{i}.png', 1000*(i%2)+i)
    small = dict(ssl_pretrain='--arch test_mambaout --no-low-resolution --hidden-size 16 --bs 16 --n-protos 5 --workers 0 --epochs 1 --warmup-epochs 0', ssl_labels='--counts 1 2 --seeds 2 --no-scratch --size 28 --workers 0')
    for line in lines:
        nm,*words = shlex.split(line)
        if nm=='ssl_explore': continue
        monkeypatch.setattr(sys, 'argv', [nm, *words, *small.get(nm, '').split()])
        try: code = getattr(cli, nm)()
        except SystemExit as e: code = e.code
        assert not code, (line, code)
    found = {o.name for o in Path('run').iterdir()}
    assert {'features.parquet','duplicates.csv','duplicates.html','similar.csv','similar.html','selected.csv','selected.html','labels.csv','labels.png'}<=found
    assert len(rows(Path('run/selected.csv')))==100
    x,df = read_features('run')
    assert len(x)==121 and {'again.jpg','003.jpg'}<=set(df.path)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    words = next(o for o in lines if o.startswith('ssl_explore')).split()[1:]
    pytest.importorskip('streamlit')
    with subprocess.Popen([sys.executable, '-W', 'ignore', '-c', f'import sys; sys.argv = {["ssl_explore", *words, "--port", str(port), "--no-browser"]!r}; from self_supervised.cli import ssl_explore; ssl_explore()'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as p:
        try:
            for _ in range(300):
                try: page = urllib.request.urlopen(f'http://127.0.0.1:{port}/', timeout=5).read().decode()
                except OSError: time.sleep(.2)
                else: break
            assert 'Image map' in page
        finally: p.kill()

def test_what_the_run_drew_is_no_image(tmp_path, monkeypatch):
    "A run that lies among the images: its pictures of views and losses are not embedded"
    for i in range(20): draw(tmp_path/f'{i:02}.png', i)
    kw = dict(arch='test_mambaout', low_resolution=False, hidden_size=16, bs=8, warmup_epochs=0., n_protos=5, workers=0, epochs=1)
    cli.ssl_pretrain(tmp_path, 'swav_small', out=tmp_path/'run', **kw)
    assert (tmp_path/'run'/'views.png').is_file()
    cli.ssl_embed(str(tmp_path/'run'), tmp_path)
    assert len(read_features(tmp_path/'run')[0])==20
