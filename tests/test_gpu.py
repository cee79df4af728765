"""On a card everything is as on a CPU: views, every method, files, commands, processes; and it is never waited for

`make test-gpu` runs it; without a card it is skipped. `SSL_TEST_DEVICE=cpu pytest tests/test_gpu.py` runs on a CPU what asks for no card, to see that the tests themselves are right."""
import os
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8') # before the first product on a card; without it none has a deterministic kernel
os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '1') # the models are so small that helping processes would only have to be started

import gc, subprocess, sys, time, traceback, warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest, torch

dev = torch.device(os.environ.get('SSL_TEST_DEVICE', 'cuda'))
if dev.type=='cuda' and not torch.cuda.is_available():
    pytest.skip('no CUDA device, so nothing was tested: run `make test-gpu` on a machine that has one, with a PyTorch for CUDA', allow_module_level=True)

import numpy as np
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find into Learner)
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.optimizer import SGD
from fastai.torch_core import default_device, set_seed
from fastai.vision.core import imagenet_stats
from fasttransform import Pipeline
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn, Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import self_supervised, test_checkpoint, test_dist
from self_supervised import pixels, views as views_module
from self_supervised.augmentations import *
from self_supervised.checkpoint import load_encoder
from self_supervised.core import ssl_callback
from self_supervised.data import tensor_dls
from self_supervised.diagnostics import CollapseMonitor
from self_supervised.dist import unwrapped
from self_supervised.layers import checkpoint_encoder
from self_supervised.online import OnlineKNN
from self_supervised.optimizer import LARC, LARS
from self_supervised.packed import pack_images
from self_supervised.pipelines import make_views
from self_supervised.pretrained import export_onnx
from self_supervised.whole_images import WholeImageDL

import methods
from methods import augs, callback, corners, encoder, loaders, model, quiet, small_encoder
from processes import on_ranks, start

cpu,on_card = torch.device('cpu'),dev.type=='cuda'
card_only   = pytest.mark.skipif(not on_card, reason='asks for a card')
each_method = pytest.mark.parametrize('name', methods.methods)

@pytest.fixture(autouse=True)
def plain_kernels():
    "No TF32, in which a card convolves unless told otherwise; and no trials which kernel is fastest"
    flags,before = torch.backends.cudnn,(torch.backends.cudnn.allow_tf32,torch.backends.cudnn.benchmark)
    flags.allow_tf32 = flags.benchmark = False
    yield
    flags.allow_tf32,flags.benchmark = before
    plt.close('all')

@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- The same draws on both

_fills = {Tensor.uniform_, Tensor.normal_, Tensor.random_, Tensor.bernoulli_, Tensor.exponential_}
_draws = {torch.rand, torch.randn, torch.randint, torch.randperm}

class DrawnOnCPU(TorchFunctionMode):
    "What is random is drawn on the CPU, wherever it goes"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _fills: return args[0].copy_(func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs))
        if func not in _draws: return func(*args, **kwargs)
        device = kwargs.pop('device', None) or cpu
        if kwargs.get('generator') is not None: kwargs['generator'] = torch.Generator().manual_seed(kwargs['generator'].initial_seed())
        return func(*args, **kwargs).to(device)

def on(device, pipes, x, make=make_views):
    "Views of `x` on `device`, with the draws of a CPU, back on the CPU; a CPU in place of a card works as devices do"
    set_seed(7)
    before = torch.cuda.get_rng_state() if on_card else None
    with DrawnOnCPU(), pytest.MonkeyPatch.context() as mp:
        if device is not cpu and not on_card:
            for o in (pixels, views_module): mp.setattr(o, 'one_by_one', lambda x: False)
        views = make(pipes, x.to(device))
    assert all(v.device.type==device.type and v.dtype==torch.float32 for v in views)
    assert not on_card or torch.equal(before, torch.cuda.get_rng_state()), 'something was drawn on the card, where DrawnOnCPU does not see it'
    return [v.cpu() for v in views]

def photos(h, w, c=3, n=12, seed=0):
    "(n,c,h,w) uint8: smooth colours, and noise"
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(n,c,4,5, generator=g), (h,w), mode='bilinear')
    return ((.7*x + .3*torch.rand(n,c,h,w, generator=g))*255).round().byte()

def mixed(c=3): return [photos(h, w, c, 1, i)[0] for i,(h,w) in enumerate([(40,54), (54,40), (20,90), (96,12), (9,9), (31,31)])]

def assert_close_views(a, b, jumps=False):
    "To 1e-4, but for the few pixels that rounding brings over an edge where the operation jumps"
    for v,w in zip(a, b, strict=True):
        assert v.shape==w.shape
        d = (v-w).abs()
        assert d.max()<1e-4 or jumps and (d>1e-4).float().mean()<1e-3, f'{d.max():.2g} at most, {(d>1e-4).float().mean():.2%} of the pixels differ'

wide    = dict(blur_s=(1.7,2.)) # a CPU cuts Gaussians at three of the largest sigma of a block, here where the kernel ends anyway
nothing = dict(jitter=False, bw=False, blur=False, stats=None, flip_p=0., **wide)
operations = dict(crop={}, flip=dict(flip_p=.5), rotate=dict(rotate=True, rotate_p=.7), jitter=dict(jitter=True), exact_hue=dict(jitter=True, exact_hue=True, jitter_s=.5), gray=dict(bw=True, bw_p=.5),
                  blur=dict(blur=True), solarize=dict(solarize=True, solarize_p=.5), normalise=dict(stats=imagenet_stats), one_draw=dict(jitter=True, blur=True, same_on_batch=True),
                  all=dict(rotate=True, jitter=True, bw=True, blur=True, flip_p=.5, solarize=True))
jumpy = 'exact_hue','solarize','all' # the largest channel may be another one, or a threshold is passed

@pytest.mark.filterwarnings('ignore:images with')
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize('c', [1,3,5])
@pytest.mark.parametrize('op', operations)
def test_operation(op, c, dtype):
    "Together, step by step, and of images of their own sizes. A CPU rounds the crops of bytes, so it is asked for those of floats"
    kw = nothing | operations[op]
    if kw['stats'] and c!=3: kw['stats'] = [.4]*c,[.2]*c
    pipe,jumps = get_batch_augs((16,20), **kw),op in jumpy
    def _steps(pipe, x): return [Pipeline.__call__(pipe, x)]
    for x,want in ((photos(33, 28, c), photos(33, 28, c)/255), (pack_images(mixed(c)), pack_images([o/255 for o in mixed(c)]))):
        if dtype==torch.float32: x = want
        assert_close_views(on(dev, [pipe]*2, x), on(cpu, [pipe]*2, want), jumps)
        assert_close_views(on(dev, pipe, x, _steps), on(cpu, pipe, want, _steps), jumps)

@each_method
def test_pipelines(name):
    "The method's own, in their defaults but for size and sigma"
    pipes = methods.methods[name].get_aug_pipelines(**methods.taken(methods.methods[name].get_aug_pipelines, num_crops=(2,3), crop_sizes=(24,12), size=24, n=2), **wide)
    for x,want in ((photos(40, 36), photos(40, 36)/255), (pack_images(mixed()), pack_images([o/255 for o in mixed()]))):
        assert_close_views(on(dev, pipes, x), on(cpu, pipes, want), jumps=True)

@pytest.mark.parametrize('builder', [get_torchvision_batch_augs, get_kornia_batch_augs, get_fastai_batch_augs])
def test_other_builders(builder):
    "Without chance they have one result; and all their operations run"
    x = photos(32, 32)/255
    same = builder(32, **nothing|dict(resize_scale=(1.,1.), resize_ratio=(1.,1.)))
    assert_close_views([same(x.to(dev)).cpu()], [x])
    v = builder(16, rotate=True)(x.to(dev))
    assert v.device.type==dev.type and v.shape==(12,3,16,16) and v.isfinite().all()

@pytest.mark.parametrize('form', [torch.stack, pack_images], ids=['squares','whole'])
def test_center_crop(form):
    x = list(photos(40, 30)) if form is torch.stack else mixed()
    def _crop(size, x): return [center_crop(x, size)]
    assert_close_views(on(dev, 24, form(x), _crop), on(cpu, 24, form([o/255 for o in x]), _crop))


# ---- Ten steps of every method

def pictures(n=40): return photos(14, 14, 1, n)/255

def learn_on(device, name, cbs=(), change=lambda enc: enc, **kwargs):
    "A Learner with the same weights, order and views on any device; the views are corners, so that nothing is left to chance"
    set_seed(0)
    views,x = corners(*(12,12,8,8)[:len(augs(name))]),pictures()
    return Learner(loaders(name, x, x[:8], device=device, seed=0), model(name, enc=change(small_encoder())), opt_func=partial(SGD, mom=.9), cbs=[callback(name, views), *cbs], **kwargs)

def ten_steps(learn):
    "Losses, and the state at the end, on the CPU. Steps of one length for all methods, or some would be thrown about"
    class Seen(Callback):
        order = 90
        def before_fit(self): self.all = []
        def after_batch(self): self.all.append(self.learn.loss.detach())
    with DrawnOnCPU(): quiet(learn, 2, .02, cbs=[seen:=Seen(), GradientClip(.2)])
    assert len(seen.all)==12 # and one of validation an epoch
    return dict(losses=torch.stack(seen.all).cpu(), **{k:v.cpu() for k,v in unwrapped(learn.model).state_dict().items()})

def assert_same_run(a, b, tol=2e-3):
    """Relative to the largest number of each tensor, or to 0.1: a bias in front of a batch norm is rounding and nothing else. On a CPU weights that begin
    1e-6 from these, which is a few roundings, end 2e-5 from them; those that learn most slowly move 2e-2"""
    off = {k:((a[k]-b[k]).abs().max()/b[k].abs().max().clamp(min=.1)).item() for k in b if b[k].numel()}
    assert set(a)==set(b) and all(a[k].shape==b[k].shape for k in b)
    bad = {k:f'{v:.2g}' for k,v in off.items() if not v<tol}
    assert not bad, bad

@each_method
def test_ten_steps(name):
    learn = learn_on(dev, name)
    assert_same_run(ten_steps(learn), ten_steps(learn_on(cpu, name)))
    assert all(o.device.type==dev.type for o in (*learn.model.parameters(), *learn.model.buffers()))

@each_method
def test_gradient_accumulation(name):
    a,b = (ten_steps(learn_on(o, name, cbs=[GradientAccumulation(16)])) for o in (dev, cpu))
    assert_same_run(a, b)

@each_method
def test_checkpoint_encoder(name):
    assert_same_run(ten_steps(learn_on(dev, name, change=checkpoint_encoder)), ten_steps(learn_on(cpu, name)))

@each_method
def test_channels_last(name):
    learn,seen = learn_on(dev, name, cbs=[ChannelsLast()]),[]
    learn.model.encoder[0].register_forward_hook(lambda m, x, out: seen.append(out.is_contiguous(memory_format=torch.channels_last)))
    assert_same_run(ten_steps(learn), ten_steps(learn_on(cpu, name)))
    assert all(seen)

@each_method
def test_compile(name):
    "The whole model, in one piece"
    learn = learn_on(dev, name)
    learn.model = torch.compile(learn.model, fullgraph=True, backend='inductor' if on_card else 'aot_eager')
    assert_same_run(ten_steps(learn), ten_steps(learn_on(cpu, name)))

@each_method
@pytest.mark.parametrize('mode', ['bf16','fp16'])
def test_half_precision(name, mode):
    "The first losses are near those of float32, later ones drift apart: bfloat16 has three digits, of which temperatures take one or two, and clusters of rounded features are others"
    learn,seen = learn_on(dev, name, cbs=[MixedPrecision(mode, init_scale=1.)]),set() # a larger one may leave out the first steps
    learn.model.encoder[0].register_forward_hook(lambda m, x, out: seen.add(out.dtype))
    half,full = ten_steps(learn),ten_steps(learn_on(dev, name))
    assert not on_card or dict(bf16=torch.bfloat16, fp16=torch.float16)[mode] in seen
    assert all(o.isfinite().all() for o in half.values())
    off = ((half['losses']-full['losses']).abs()/full['losses'].abs().clamp(min=1))[:3].max()
    assert off<.1 and (off>0 or not on_card), f'{off:.2g}'


# ---- What looks on

def looked(device, name, folder):
    "What monitor, k-NN, validation, pictures and `lr_find` say"
    x,y = pictures(),torch.arange(40)%4
    labelled = tensor_dls((x,y), (x.flip(3),y), bs=16, device=device, drop_last=False)
    folder.mkdir()
    learn = learn_on(device, name, cbs=[CollapseMonitor(every=2, warmup=1000), OnlineKNN(labelled, k=3)], path=folder)
    with warnings.catch_warnings(), DrawnOnCPU():
        warnings.simplefilter('ignore')
        quiet(learn, 2, .02)
        res = {k:torch.tensor(v, dtype=torch.float) for k,v in learn.collapse_monitor.history.items()}
        res['values'] = torch.tensor([o[:2] for o in learn.recorder.values])
        res['valid'] = torch.tensor(learn.validate()[0])
        before = {k:v.clone() for k,v in learn.model.state_dict().items()}
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=7, start_lr=1e-3, end_lr=.1, show_plot=False)
        res['lr_find'] = torch.stack(list(learn.recorder.losses))
        assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) # it leaves no trace
        shown = ssl_callback(learn).show(n=2)
        learn.dls.show_batch(max_n=2)
    res['shown'] = torch.stack([torch.as_tensor(np.asarray(o.images[0].get_array(), dtype=float).mean()) for o in shown]).float()
    return res,[acc for _,acc in learn.online_knn.history]

@each_method
def test_looking_on(name, tmp_path):
    (a,knn_a),(b,knn_b) = (looked(o, name, tmp_path/f'{i}') for i,o in enumerate((dev, cpu)))
    assert set(a)==set(b)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=5e-3, atol=5e-3, msg=lambda s: f'{k}: {s}')
    assert knn_a==pytest.approx(knn_b, abs=.051) # of 40 images, two


# ---- Nobody waits for the card

fastais_own = [(MixedPrecision,'before_step')] # fp16 asks whether a gradient is infinite; losses are noted when they have come, see `dist`

package = Path(self_supervised.__file__).parent

def line_of_ours(stack):
    "The last line of the package that leads to the last line of all"
    ours = [o for o in stack if package in Path(o.filename).parents] or stack[-1:]
    return f'{Path(ours[-1].filename).name}:{ours[-1].lineno} in {ours[-1].name}: {ours[-1].line}'

@contextmanager
def watched(found):
    "Add to `found` every line that waits for the card"
    def _note(message, category, filename, lineno, file=None, line=None):
        if 'synchronizing CUDA' in str(message): found.add(line_of_ours([o for o in traceback.extract_stack()[:-1] if Path(o.filename).name!='warnings.py']))
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = _note
        if on_card: torch.cuda.set_sync_debug_mode('warn') # 'error' would tell of the first line only
        try: yield
        finally:
            if on_card: torch.cuda.set_sync_debug_mode('default')

@contextmanager
def unwatched():
    if not on_card: yield; return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('default')
    try: yield
    finally: torch.cuda.set_sync_debug_mode(mode)

@pytest.fixture
def waits(monkeypatch):
    "Fit, and get the lines that wait for the card between the first batch of an epoch, which is looked at, and its end"
    for cls,nm in fastais_own:
        def _own(self, *args, _f=getattr(cls, nm)):
            with unwatched(): return _f(self, *args)
        monkeypatch.setattr(cls, nm, _own)
    def _waits(learn, n=2):
        found,one_batch,steps = set(),learn.one_batch,[]
        def _one_batch(i, b):
            steps.append(i)
            with watched(found) if i and learn.training else nullcontext(): one_batch(i, b)
        learn.one_batch = _one_batch
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            quiet(learn, n, 1e-3)
        assert len(steps)>4*n
        return sorted(found)
    return _waits

settings = dict(fp32=[], bf16=[partial(MixedPrecision, 'bf16')], fp16=[partial(MixedPrecision, 'fp16')], accumulation=[partial(GradientAccumulation, 16)], channels_last=[ChannelsLast])

def watched_learner(name, cbs=(), **kwargs):
    "Everything that happens to views, bytes, three channels"
    set_seed(0)
    pipes = augs(name, jitter=True, bw=True, blur=True, stats=imagenet_stats, rotate=True)
    dls = loaders(name, photos(14, 14, n=48), photos(14, 14, n=8), bs=8, device=dev)
    return Learner(dls, model(name, n_in=3, enc=encoder(3)), cbs=[callback(name, pipes), CollapseMonitor(every=2, warmup=1000), *cbs], **kwargs)

def assert_not_waited_for(found):
    if found: pytest.fail('these lines wait for the card:\n' + '\n'.join(found), pytrace=False)

@card_only
def test_waiting_is_seen(waits):
    class Waits(Callback):
        def after_loss(self): self.learn.loss.item()
    found = waits(watched_learner('simclr', [Waits()]))
    assert any('self.learn.loss.item()' in o for o in found), found

@each_method
@pytest.mark.parametrize('cbs', settings.values(), ids=settings)
def test_never_waited_for(name, cbs, waits):
    assert_not_waited_for(waits(watched_learner(name, [o() for o in cbs])))

@pytest.mark.parametrize('name', ['swav','supcon'])
def test_never_waited_for_whole_images(name, waits):
    set_seed(0)
    dl = WholeImageDL([(o,i%4) for i,o in enumerate(mixed()*8)], bs=8, shuffle=True, drop_last=True, device=dev)
    learn = Learner(DataLoaders(dl, dl.new([], shuffle=False, drop_last=False), device=dev), model(name, n_in=3, enc=encoder(3)), loss_func=nn.CrossEntropyLoss(),
                    cbs=callback(name, augs(name, jitter=True, bw=True, blur=True)))
    assert_not_waited_for(waits(learn))

@pytest.mark.parametrize('opt', [LARC, LARS], ids=lambda o: o.__name__)
def test_never_waited_for_optimizers(opt, waits):
    assert_not_waited_for(waits(watched_learner('simclr', opt_func=opt)))


# ---- Saved, killed, resumed

@each_method
def test_goes_on_to_the_bit(name, tmp_path, deterministic):
    "Also what is drawn on the card: views and dropout. Then the loss is plotted, and the encoder goes to a machine without a card"
    whole,learn = test_checkpoint.check(tmp_path, 'after_backward', 6, name=name)
    learn.recorder.plot_loss()
    assert len(plt.gca().lines[0].get_xdata())==len(whole.recorder.losses)-learn.recorder.plot_loss.__defaults__[0]
    path = learn.export_encoder(tmp_path/'encoder.safetensors')
    x,enc = pictures(6),load_encoder(path, test_checkpoint.encoder())
    mine = learn.model.encoder.eval().to(dev)
    for a,b in zip(enc.state_dict().values(), mine.state_dict().values()): assert a.device.type=='cpu' and torch.equal(a, b.cpu())
    set_seed(1); want = mine(x.to(dev)).detach().cpu()
    set_seed(1)
    torch.testing.assert_close(enc.eval()(x).detach(), want, atol=1e-4, rtol=1e-4)
    learn.export(tmp_path/'learner.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        back = load_learner(tmp_path/'learner.pkl', cpu=True)
    for a,b in zip(back.model.state_dict().values(), learn.model.state_dict().values()): assert a.device.type=='cpu' and torch.equal(a, b.cpu())

def test_onnx(tmp_path):
    "A graph for machines without a card has the features of the card"
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    from onnx.reference import ReferenceEvaluator
    learn = learn_on(dev, 'simclr')
    ten_steps(learn)
    graph,x = onnx.load(export_onnx(learn, tmp_path/'encoder.onnx', size=14)),pictures(5)
    want = learn.model.encoder.eval()(x.to(dev)).detach().cpu()
    torch.testing.assert_close(torch.from_numpy(ReferenceEvaluator(graph).run(None, {'images':x.numpy()})[0]), want, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('cbs', settings.values(), ids=settings)
def test_goes_on_with(cbs, tmp_path, deterministic): test_checkpoint.check(tmp_path, 'after_backward', 6, cbs=cbs)

class Slow(Callback):
    def after_batch(self): time.sleep(.05)

def dies(folder):
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    test_checkpoint.fit(test_checkpoint.make(folder, cbs=[Slow]))

def test_killed(tmp_path, deterministic):
    "A process that SIGKILL ends goes on in this one"
    whole = test_checkpoint.make(tmp_path/'whole', cbs=[Slow])
    test_checkpoint.fit(whole)
    end = time.monotonic()+120
    with start(dies, tmp_path/'dying') as p:
        while not list((tmp_path/'dying').glob('*.ckpt')):
            assert p.poll() is None and time.monotonic()<end, p.err()
            time.sleep(.01)
        p.kill()
        assert p.wait(60)==-9
    learn = test_checkpoint.go_on(tmp_path/'dying', cbs=[Slow])
    assert test_checkpoint.same(test_checkpoint.outcome(whole), test_checkpoint.outcome(learn))


# ---- The command line

def test_command_line(tmp_path):
    "Pictures of two kinds that nobody could confuse: from files to a run, stopped at none, to the answer of k-NN"
    for part in ('train','val'):
        for i in range(32):
            x = photos(28, 28, n=1, seed=i)[0]//3 + (170 if i%2 else 0)
            path = tmp_path/'images'/part/('bright' if i%2 else 'dark')/f'{i:02}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.permute(1,2,0).numpy()).save(path)
    def _run(*words):
        r = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'self_supervised', *map(str, words)], capture_output=True, text=True, cwd=root, timeout=300)
        assert r.returncode==0, r.stdout+r.stderr
        return r.stdout
    out = tmp_path/'run'
    said = _run('ssl_pretrain', tmp_path/'images'/'train', '--recipe', 'simclr_small', '--arch', 'resnet18', '--bs', 16, '--epochs', 2, '--warmup-epochs', 1, '--workers', 2, '--labelled', tmp_path/'images',
                '--precision', 'bf16', '--out', out)
    assert not on_card or torch.cuda.get_device_name() in said
    assert {'checkpoints','encoder.safetensors','history.csv','settings.json','views.png','loss.png'} <= {o.name for o in out.iterdir()}
    assert [o.split()[0] for o in said.splitlines() if o[:1].isdigit()]==['0','1'], said
    assert '100.0 %' in _run('ssl_knn', out, tmp_path/'images', '--k', 3)

root = Path(__file__).resolve().parent.parent


# ---- Processes

def two_ranks(folder):
    with DrawnOnCPU(): return test_dist.training(folder)

def on_cpu(steps, state): return [{k:v.cpu() for k,v in o.items()} for o in steps],{k:v.cpu() for k,v in state.items()}

def test_two_processes_on_one_card(tmp_path):
    "gloo: losses, gradients, queues and weights are those of one process on a CPU"
    many = on_ranks(two_ranks, tmp_path, 2)
    default_device(False)
    try:
        for c in test_dist.cases:
            with DrawnOnCPU(): one = test_dist.train(c, test_dist.bs*2, tmp_path, order=test_dist.joined(2))
            for o in many:
                assert all(v.device.type==dev.type for k,v in o[c][1].items() if not k.endswith('_extra_state'))
                test_dist.assert_same_steps(on_cpu(*o[c]), one)
    finally: default_device(None)

def test_everyday_on_one_card(tmp_path): test_dist.test_everyday(tmp_path) # with SyncBatchNorm, where there is a card

def one_rank(folder):
    def _fit(learn):
        with learn.distrib_ctx(): return ten_steps(learn)
    return {nm:_fit(learn_on(dev, nm)) for nm in methods.methods}

def test_one_process_of_nccl(tmp_path):
    "Wrapped by DDP, with SyncBatchNorm: as without"
    got, = on_ranks(one_rank, tmp_path, 1, backend='nccl' if on_card else 'gloo')
    for nm in methods.methods: assert_same_run(got[nm], ten_steps(learn_on(dev, nm)))


# ---- Memory

@card_only
@each_method
def test_memory_does_not_grow(name):
    "After eight epochs of 25 steps as after the first"
    class Memory(Callback):
        order = 95
        def before_fit(self): self.seen = []
        def after_batch(self):
            if self.training and self.iter==24:
                gc.collect()
                self.seen.append(torch.cuda.memory_allocated())
    learn = Learner(loaders(name, pictures(200), bs=8, device=dev), model(name), cbs=[callback(name), CollapseMonitor(every=5, warmup=1000), mem:=Memory()])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet(learn, 8, 1e-3)
    assert len(mem.seen)==8 and abs(mem.seen[-1]-mem.seen[1])<2**14, mem.seen
