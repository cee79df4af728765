"ssl_pretrain on whole images of mixed sizes: what is loaded, killed runs, squares, runs of version 0.9; and the judges, which keep their squares"
import json, signal

import numpy as np, pytest, torch
from PIL import Image

import processes
from self_supervised import cli, cli_log, cli_pretrain
from self_supervised.cli_command import in_shell, _flags
from self_supervised.cli_judge import cut_sizes, labelled_dls
from self_supervised.data import image_dls
from self_supervised.export import load_encoder
from self_supervised.packed import PackedImages
from self_supervised.recipes import Recipe, get_recipe

sizes = [(30,40), (40,30), (28,28), (30,120), (200,90), (100,1000)] # (h,w)

def picture(i, h, w): return Image.fromarray(np.random.default_rng(i).integers(0, 255, (h,w), dtype=np.uint8))

def mixed(folder, n=24):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): picture(i, *sizes[i%len(sizes)]).save(folder/f'{i:02}.png')
    return folder

@pytest.fixture(scope='module')
def images(tmp_path_factory): return mixed(tmp_path_factory.mktemp('im'))

args = dict(recipe='swav_small', n_in=1, arch='test_mambaout', low_resolution=False, hidden_size=16, bs=8, warmup_epochs=0., n_protos=5, workers=0, epochs=1)

@pytest.fixture
def quick(monkeypatch):
    "A run in this process, of three steps an epoch, without pictures"
    for o in ('save_views','save_curves'): monkeypatch.setattr(cli_pretrain, o, lambda learn: None)
    return lambda source, out, **kwargs: cli.ssl_pretrain(source, out=out, **{**args, **kwargs})

@pytest.fixture
def loaded(monkeypatch, images, tmp_path):
    "The first validation-like batch of what a command would train on: all images, in the order of their names"
    class Stop(Exception): pass
    def stop(self, dls, *args, **kwargs): raise Stop(dls)
    monkeypatch.setattr(Recipe, 'learner', stop)
    def _loaded(**kwargs):
        with pytest.raises(Stop) as e: cli.ssl_pretrain(images, out=tmp_path/f'{len(list(tmp_path.iterdir()))}', **{**args, 'bs':24, **kwargs})
        dl = e.value.args[0].train
        return dl.do_batch([dl.do_item(i) for i in range(len(sizes))])[0]
    return _loaded

@pytest.mark.parametrize('kwargs,want', [
    (dict(),                              [(30,40), (40,30), (28,28), (30,90), (142,64), (64,192)]), # 16/7 of 28 is 64
    (dict(load_size=32),                  [(30,40), (40,30), (28,28), (30,90), (71,32), (32,96)]),
    (dict(max_aspect=1.5),                [(30,40), (40,30), (28,28), (30,45), (96,64), (64,96)]),
    (dict(max_aspect=20., load_size=500), [(30,40), (40,30), (28,28), (30,120), (200,90), (100,1000)]),
    (dict(crop_sizes=(24,8)),             [(30,40), (40,30), (28,28), (30,90), (120,54), (54,162)])])
def test_whole_images_are_loaded(loaded, kwargs, want):
    x = loaded(**kwargs)
    assert type(x) is PackedImages and x.sizes.tolist()==[list(o) for o in want] and x.dtype==torch.uint8
    for i in range(3): assert np.array_equal(x.images[i][0], picture(i, *sizes[i])), 'smaller images are as they are in their files'

@pytest.mark.parametrize('kwargs,side', [(dict(), 32), (dict(load_size=40), 40)])
def test_squares_are_loaded(loaded, kwargs, side):
    x = loaded(squares=True, **kwargs)
    assert x.shape==(len(sizes),1,side,side)
    h,w = sizes[0]
    ref = picture(0, h, w).resize((side,side), Image.Resampling.BILINEAR, box=(5,0,35,30))
    assert np.array_equal(x[0,0], ref)

# Killed within an epoch

dying = '''
import json, os, signal, sys
from self_supervised import cli, cli_pretrain
from self_supervised.checkpoint import Checkpoint
after = Checkpoint.after_batch
def dying(self):
    after(self)
    if self.training and self.learn.train_iter==5: os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.after_batch = dying
cli_pretrain.save_views = lambda learn: None
cli.ssl_pretrain(sys.argv[1], out=sys.argv[2], **json.loads(sys.argv[3]))
'''

def test_killed_judged_and_exported(images, tmp_path, quick, capsys):
    "Killed in the second of three epochs, the run ends as one that was not, to the bit; random windows of panoramas included"
    kw = dict(epochs=3, minutes=1e-7)
    assert quick(images, tmp_path/'whole', **kw)==0
    assert 'Training on 24 whole images, with a shorter side of 64 pixels at most, in batches of 8, 3 steps an epoch' in capsys.readouterr().out
    p = processes.run('-c', dying, images, tmp_path/'run', json.dumps(args|kw))
    assert p.returncode==-signal.SIGKILL, p.stderr
    assert max(o.name for o in (tmp_path/'run'/'checkpoints').glob('*.ckpt'))[-5-9:-5] in ('000000004','000000005') # the last may not have been whole yet
    assert quick(images, tmp_path/'run', resume=True, **kw)==0
    a,b = (load_encoder(tmp_path/o/'encoder.safetensors').state_dict() for o in ('whole','run'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    a,b = ((tmp_path/o/'history.csv').read_text() for o in ('whole','run'))
    assert a==b and a.count('\n')==4

    said = json.loads((tmp_path/'run'/'settings.json').read_text())['run']
    assert (said['squares'], said['load_size'], said['max_aspect'])==(False, None, None)
    for c in 'ab': mixed(tmp_path/'labelled'/c, 6)
    assert float(cli.ssl_knn(str(tmp_path/'run'), str(tmp_path/'labelled'), k=1, valid_pct=.5, workers=0, results=tmp_path/'r'))==.5 # each image is in both classes, the first wins
    assert json.loads((tmp_path/'r').read_text())['size']==[28,28]
    cli.ssl_export(str(tmp_path/'run'), tmp_path/'e.safetensors')
    assert all(torch.equal(v, a) for v,a in zip(load_encoder(tmp_path/'e.safetensors').state_dict().values(), load_encoder(tmp_path/'run'/'encoder.safetensors').state_dict().values()))

def test_judges_keep_squares(tmp_path):
    "The shorter side to 256 for 224, the centre cut out: 8/7 below"
    for c in 'ab': mixed(tmp_path/c, 6)
    size,resize = cut_sizes(112)
    assert (size,resize)==((112,112),(128,128))
    x,_ = next(iter(labelled_dls(tmp_path, size, resize, 1, bs=12, workers=0, valid_pct=.01).valid))
    assert x.shape==(2,1,112,112)
    found = 0
    for i,(h,w) in enumerate(sizes):
        n,l,t = min(h, w),(w-min(h, w))//2,(h-min(h, w))//2
        ref = np.asarray(picture(i, h, w).resize((128,128), Image.Resampling.BILINEAR, box=(l,t,l+n,t+n)))[8:120,8:120]
        found += sum(np.abs(o[0].numpy()*255-ref).max()<.01 for o in x)
    assert found==2

# Other settings

def test_settings_are_those_of_the_run(images, tmp_path, quick):
    quick(images, tmp_path/'whole')
    quick(images, tmp_path/'squares', squares=True, load_size=40)
    for out,kwargs,says in (('whole', dict(squares=True), 'squares: False → True'), ('whole', dict(load_size=40), 'load_size: None → 40'), ('whole', dict(max_aspect=2.), 'max_aspect: None → 2.0'),
                            ('squares', dict(load_size=40), 'squares: True → False'), ('squares', dict(squares=True), 'load_size: 40 → None')):
        with pytest.raises(ValueError, match=f'{says}.*--override {says.partition(":")[0]}'): quick(images, tmp_path/out, **kwargs)
    with pytest.raises(ValueError, match='(?s)run with other settings.*--override load_size '): quick(images, tmp_path/'whole', load_size=40, override=['load_size'])

def test_runs_of_0_9_go_on_as_squares(images, tmp_path, quick, capsys):
    kw,run = dict(epochs=2, minutes=1e-7),tmp_path/'run'
    quick(images, run, squares=True, **kw)
    want = load_encoder(run/'encoder.safetensors').state_dict()
    for f in sorted((run/'checkpoints').iterdir())[1:]: f.unlink() # back to an earlier step
    (run/'encoder.safetensors').unlink()
    said = json.loads((run/'settings.json').read_text())
    for k in ('squares','max_aspect'): del said['run'][k] # which 0.9 did not have
    (run/'settings.json').write_text(json.dumps(said))
    with pytest.raises(ValueError, match='--max-aspect 2: squares have none'): quick(images, run, max_aspect=2., **kw)
    with pytest.raises(ValueError, match='(?s)other settings.*--override squares '): quick(images, run, override=['squares'], **kw)
    capsys.readouterr()
    assert quick(images, run, **kw)==0
    out = capsys.readouterr().out
    assert 'was begun with squares, by version 0.9, and goes on with them' in out and 'images, cut to 32×32 pixels, in batches' in out
    got = load_encoder(run/'encoder.safetensors').state_dict()
    assert all(torch.equal(want[k], got[k]) for k in want)

def test_mistakes(images, tmp_path, quick, monkeypatch, capsys):
    def says(*words):
        monkeypatch.setattr('sys.argv', ['ssl_pretrain', str(images), '--recipe', 'swav_small', '--n-in', '1', '--bs', '8', '--out', str(tmp_path/'run'), *words])
        with pytest.raises(SystemExit) as e: cli.ssl_pretrain()
        return f'{e.value.code} {capsys.readouterr().err}'
    assert '--max-aspect 0.5 is longer side/shorter side: it must be 1 (squares) or more, or a large number for images as long as they are' in says('--max-aspect', '0.5')
    assert '--max-aspect 2: squares have none: leave it out, or --squares' in says('--squares', '--max-aspect', '2')
    assert '--load-size 20 is less than the views that are cut from it, 28×28: 64 is usual' in says('--load-size', '20')
    assert '28×28: 32 is usual' in says('--load-size', '20', '--squares')
    for o,flag in (('--short-side','--load-size'), ('--center-crop','--squares')): assert f'{o} is unknown: here it is {flag}' in says(o, '30')
    assert not (tmp_path/'run').exists()
    for nm in ('size','short_side'): assert in_shell(f'Load larger images, {nm}=64 or more', _flags(cli.ssl_pretrain))=='Load larger images, --load-size 64 or more'

# Pictures and suggestions

@pytest.mark.filterwarnings('ignore:images with 1 channel')
def test_views_are_drawn(images, tmp_path):
    learn = get_recipe('swav_small', arch='test_mambaout').learner(image_dls(images, bs=8, n_in=1), path=tmp_path)
    before = torch.random.get_rng_state(),learn.dls.train.rng.getstate()
    cli_log.save_views(learn)
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1]==learn.dls.train.rng.getstate()
    assert Image.open(tmp_path/'views.png').size[0]>300

@pytest.mark.filterwarnings('ignore:.*images are few')
@pytest.mark.parametrize('kwargs,pixels', [(dict(), [30*40, 40*30, 28*28, 30*90, 142*64, 64*192]), (dict(load_size=32, max_aspect=2.), [30*40, 40*30, 28*28, 30*60, 64*32, 32*64]), (dict(squares=True), [900, 900, 28*28, 900, 1024, 1024])])
def test_suggest_looks_at_the_images(images, tmp_path, capsys, kwargs, pixels):
    cli.ssl_pretrain(images, 'swav_small', tmp_path/'out', n_in=1, suggest=True, **kwargs)
    out,views = capsys.readouterr().out,4*(2*28**2+4*14**2)
    pixels = sorted(pixels)
    assert f'(the largest of 24: {pixels[-1]/1e6:.3g} MB) and {views/1e6:.3g} MB of views' in out, out
    assert f'An image takes {(pixels[2]+pixels[3])/2e6:.3g} MB of pixels' in out, out
    assert 'shorter side of fewer pixels' not in out
