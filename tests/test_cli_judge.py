"What ssl_knn, ssl_linear, ssl_semisup and ssl_export make of folders, flags and files"
import json, shutil

import numpy as np, pytest, safetensors, torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastcore.basics import noop
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop

from self_supervised import cli, cli_judge
from self_supervised.cli_judge import Judge, cut_sizes, labelled_dls, open_encoder
from self_supervised.all import create_encoder, create_swav_model, load_encoder

def save(fn, a):
    fn.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(fn)

def flat(v, size=12): return np.full((size,size), v, np.uint8)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Classes of 12, 5, 2 images and of one; brightness says which"
    path = tmp_path_factory.mktemp('data')
    for c,n in dict(a=12, b=5, c=2, d=1).items():
        for i in range(n): save(path/c/f'{i:02}.png', flat(60*'abcd'.index(c)+i))
    return path

@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    "The file of an encoder of grey images"
    torch.manual_seed(0)
    model = create_swav_model(create_encoder('test_mambaout', pretrained=False, n_in=1), 8, 4, n_protos=5)
    return Learner(DataLoaders([], []), model, loss_func=noop).export_encoder(tmp_path_factory.mktemp('encoder')/'encoder.safetensors')


# Data

@pytest.mark.parametrize('pct,n', [(None, (2,1,1,0)), (.5, (6,2,1,0)), (.99, (11,4,1,0)), (.01, (1,1,1,0))])
def test_each_class_is_split(pct, n, folder):
    "As many of each as asked for, but one on each side; an only image is to train on; the same again, whatever else is there"
    def split(p): return [[str(f.relative_to(p)) for f in dl.dataset.items] for dl in labelled_dls(p, (8,8), (8,8), 1, valid_pct=pct)]
    train,valid = split(folder)
    assert tuple(sum(o[0]==c for o in valid) for c in 'abcd')==n and sorted(train+valid)==[str(o.relative_to(folder)) for o in sorted(folder.glob('*/*'))]
    assert split(folder)==[train,valid]

def test_a_class_that_comes_later_changes_no_other(folder, tmp_path):
    shutil.copytree(folder, tmp_path/'p')
    before = {f.name for f in labelled_dls(tmp_path/'p', (8,8), (8,8), 1).valid.dataset.items if f.parent.name=='b'}
    for i in range(9): save(tmp_path/'p'/'aa'/f'{i}.png', flat(i))
    assert {f.name for f in labelled_dls(tmp_path/'p', (8,8), (8,8), 1).valid.dataset.items if f.parent.name=='b'}==before

@pytest.mark.parametrize('pct', [0, 1, 1.5, -.1])
def test_no_such_part(pct, folder):
    with pytest.raises(ValueError, match=f'valid_pct={pct} leaves none'): labelled_dls(folder, (8,8), (8,8), 1, valid_pct=pct)

@pytest.fixture(scope='module')
def strips(tmp_path_factory):
    "Grey strips with a red square at one end, in two classes, and a tall one"
    path = tmp_path_factory.mktemp('strips')
    for i in range(8):
        a = np.full((64,256,3), 128, np.uint8)
        a[16:48,(8 if i%2 else 216):][:,:32] = 255,0,0
        save(path/'lr'[i%2]/f'{i}.png', a if i<7 else a.transpose(1,0,2).copy())
    return path

def test_crops_of_whole_images(strips):
    "What lies at the ends is seen; and the views are those of torchvision, drawn on the picture itself"
    dls = labelled_dls(strips, (32,32), (32,32), 3, views=True)
    def red(dl): return sum(((b[0][:,0]-b[0][:,1])>.9).flatten(1).any(1).sum().item() for b in dl)
    assert sum(red(dls.train) for _ in range(20))>10 and red(dls.valid)==0 # in the centre there is none
    assert dls.train.one_batch()[0].shape[1:]==(3,32,32) and dls.train.one_batch()[0].dtype==torch.float32
    assert labelled_dls(strips, (24,40), (24,40), 3, views=True).train.one_batch()[0].shape[1:]==(3,24,40)
    crop,flip = RandomResizedCrop((32,32), (.08,1.)),RandomHorizontalFlip()
    for i,fn in enumerate(dls.train.dataset.items):
        torch.manual_seed(i); got = dls.train.dataset[i][0].float()
        torch.manual_seed(i); want = flip(crop(Image.open(fn)))
        assert got.shape==(3,32,32) and (got-torch.tensor(np.array(want)).permute(2,0,1)).abs().mean()<1.

@pytest.mark.parametrize('f,kw', [(cli.ssl_linear, dict(epochs=2)), (cli.ssl_semisup, dict(n_per_class=2, epochs=2))])
def test_training_on_views(f, kw, encoder, folder, tmp_path, monkeypatch):
    "They are drawn once, by the loader, of the whole file; and the same number comes out again"
    data = tmp_path/'two'
    for c in 'ab': shutil.copytree(folder/c, data/c)
    opened = []
    monkeypatch.setattr(cli_judge, '_open_view', lambda fn,crop,n_in,**_: (opened.append(crop), torch.full((n_in,32,32), 99*(fn.parent.name=='b'), dtype=torch.uint8))[1])
    a,b = (f(str(encoder), data, size=32, bs=4, results=tmp_path/'r', **kw) for _ in range(2))
    assert a.runs==b.runs and a.settings['resize_scale'] is None and opened
    assert {(t.size,t.scale) for t in (o.transforms[0] for o in opened)}=={((32,32),(.08,1.))}

def test_links_to_classes(folder, tmp_path):
    for c in 'ab': (tmp_path/f'my_{c}').symlink_to(folder/c)
    assert labelled_dls(tmp_path, (8,8), (8,8), 1).vocab==['my_a','my_b']

@pytest.mark.filterwarnings('ignore:.*more than 8 bits')
def test_deep_images(tmp_path):
    "16 bits a channel, as they are read for training"
    for c,v in dict(a=1000, b=60000).items():
        for i in range(4): save(tmp_path/c/f'{i}.png', np.full((8,8), v, np.uint16))
    for kw in ({}, dict(views=True)):
        x,y = (o.as_subclass(torch.Tensor) for o in labelled_dls(tmp_path, (8,8), (8,8), 1, **kw).train.one_batch())
        torch.testing.assert_close(x[:,0,0,0], torch.where(y==0, 1000., 60000.)/65535)


# Flags that would do nothing

@pytest.mark.parametrize('kw,msg', [
    (dict(logistic=True, epochs=3), '--epochs belongs to SGD'), (dict(logistic=True, lr=.1, schedule='step'), '--lr, --schedule belong to SGD'), (dict(logistic=True, wd=0.), '--wd belongs'),
    (dict(c=.1), '--c belongs to --logistic'), (dict(n_per_class=3), '--n-per-class belongs to --logistic'), (dict(logistic=True, seeds=5), '--seeds 5: .*give --n-per-class'),
    (dict(arch='resnet50w2'), '--arch resnet50w2 is for files of the official code'), (dict(n_in=3), r'--n-in 3: .* takes images of 1 channel'),
    (dict(size=[64], resize=[32]), r'--resize \(32, 32\) is less than --size \(64, 64\)'), (dict(size=[28,64], resize=[32,32]), 'is less than')])
def test_flags_that_would_do_nothing(kw, msg, encoder, folder, tmp_path):
    with pytest.raises(ValueError, match=msg): cli.ssl_linear(str(encoder), folder, results=tmp_path/'r', **kw)
    assert not (tmp_path/'r').exists()

def test_more_flags_that_would_do_nothing(encoder, folder, tmp_path):
    for c in 'ab': shutil.copytree(folder/c, tmp_path/'d'/'train'/c), shutil.copytree(folder/c, tmp_path/'d'/'val'/c)
    with pytest.raises(ValueError, match='--valid-pct 0.3: the images to judge on are those in .*val'): Judge(str(encoder), tmp_path/'d', valid_pct=.3)
    for nm in ('random:resnet18', 'swav_800ep'):
        with pytest.raises(ValueError, match='says itself what it is'): Judge(nm, folder, arch='resnet50')
    r = cli.ssl_linear(str(encoder), folder, size=32, logistic=True, c=.5, n_per_class=1, seeds=2, results=tmp_path/'r')
    assert r.settings['C']==.5 and len(r.runs)==2
    assert cut_sizes([64], [64])==((64,64),(64,64))


# Weights that are no numbers

@pytest.mark.parametrize('v', [float('nan'), float('inf')])
def test_a_diverged_encoder(v, encoder, folder, tmp_path):
    "is neither judged nor handed on"
    with safetensors.safe_open(encoder, 'pt') as f: info = f.metadata()
    state = load_file(encoder)
    next(o for o in state.values() if o.ndim>1)[0] = v
    save_file(state, bad := tmp_path/'encoder.safetensors', info)
    kw = dict(size=32, results=tmp_path/'r')
    for f in (lambda: cli.ssl_knn(str(bad), folder, **kw), lambda: cli.ssl_linear(str(tmp_path), folder, **kw), lambda: cli.ssl_linear(str(bad), folder, logistic=True, **kw),
              lambda: cli.ssl_semisup(str(bad), folder, n_per_class=1, **kw), lambda: open_encoder(str(bad)), *(lambda o=o: cli.ssl_export(str(bad), tmp_path/'out', o) for o in ('ours','torchvision','timm'))):
        with pytest.raises(FloatingPointError, match='has diverged'): f()
    assert sorted(o.name for o in tmp_path.iterdir())==['encoder.safetensors']

def test_a_copy_by_another_name(encoder, folder, tmp_path):
    "is what it is, whatever its name says"
    shutil.copy(encoder, copy := tmp_path/'copy.pth')
    a,b = (cli.ssl_knn(str(o), folder, k=3, size=32, results=tmp_path/'r') for o in (encoder, copy))
    assert a==b
    torch.save(dict(a=torch.zeros(3)), other := tmp_path/'other.pth')
    with pytest.raises(ValueError, match='other.pth is not a file of export_encoder'): cli.ssl_export(str(other), tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_export_is_a_copy(encoder, tmp_path):
    out = cli.ssl_export(str(encoder), tmp_path/'out.safetensors')
    assert out.read_bytes()==encoder.read_bytes() and all(torch.equal(a, b) for a,b in zip(load_encoder(out).state_dict().values(), load_encoder(encoder).state_dict().values()))

def test_answer_is_written(encoder, folder, tmp_path):
    r = cli.ssl_knn(str(encoder), folder, k=3, size=32, results=tmp_path/'r')
    line = json.loads((tmp_path/'r').read_text())
    assert line['accuracy']==r.accuracy and (line['settings']['train'],line['settings']['test'])==(16,4)

def test_white_is_that_of_the_run(tmp_path, monkeypatch):
    "Files of 12 bits in 16: what the run took for white, by itself or by a flag, is white for its judges"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['ssl_pretrain'])
    for i in range(16): save(tmp_path/'images'/'ab'[i%2]/f'{i}.png', np.random.default_rng(i).integers(0, 3000, (16,16)).astype(np.uint16))
    cli.ssl_pretrain('images', 'swav_small', 'run', n_in=1, bs=8, epochs=1, warmup_epochs=0., n_protos=4, crop_sizes=(12,8), num_crops=(2,1), load_size=14, workers=0, arch='test_resnet', stats=None, max_value=16383.)
    asked = []
    monkeypatch.setattr('self_supervised.image_files.common_depth', lambda fns, n_in, max_value=None, n=64: (asked.append(max_value), dict(dtype=torch.float32, max_value=max_value or 4095))[1])
    cli.ssl_knn('run', 'images', k=2)
    cli.ssl_knn('run', 'images', k=2, max_value=4095.)
    assert asked==[16383,4095]

def test_a_damaged_image_is_left_out(tmp_path, encoder, capsys, monkeypatch):
    "The remedy that is named is a flag of this command, and works"
    monkeypatch.setattr('sys.argv', ['ssl_knn'])
    for i in range(12): save(tmp_path/'ab'[i%2]/f'{i}.png', flat(i*20))
    (tmp_path/'a'/'bad.png').write_bytes((tmp_path/'a'/'0.png').read_bytes()[:40])
    ask = dict(size=[12], resize=[12], k=2, workers=0, results=tmp_path/'results.jsonl')
    with pytest.raises(ValueError, match='bad.png'): cli.ssl_knn(str(encoder), str(tmp_path), **ask)
    with pytest.warns(UserWarning, match='skipped 1 of 13 files.*bad.png'): r = cli.ssl_knn(str(encoder), str(tmp_path), skip_bad=True, **ask)
    assert r.settings['train']+r.settings['test']==12
