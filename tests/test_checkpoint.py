"A run that was killed ends as one that was not, to the bit; damaged files are named; encoders come back as they were"
import json, os, random, signal, threading, time, warnings
from collections import deque
from contextlib import nullcontext
from copy import deepcopy
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, timm, torch, torchvision
import torch.distributed as tdist
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find and fit_one_cycle into Learner)
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import Learner, Recorder
from fastai.optimizer import OptimWrapper, SGD
from fastai.torch_core import set_seed
from fastcore.foundation import L
from fastai.vision.augment import RandTransform
from PIL import Image
from torch import nn

from self_supervised import checkpoint, state
from self_supervised.checkpoint import Checkpoint, encoder_info, load_encoder, read_checked, write_atomic
from self_supervised.data import image_dls, tensor_dls
from self_supervised.dist import world_size
from self_supervised.layers import checkpoint_encoder, create_encoder, create_timm_encoder
from self_supervised.queue import FeatureQueue
from self_supervised.replay import batches_after
from self_supervised.run_settings import run_settings
from self_supervised.basics import rng_states
from self_supervised.state import host_copy, load_model, plain, restored, set_state, state_of
from self_supervised.vision.swav import SWAV
from self_supervised.watcher import Watcher

import methods, processes
from methods import augs, callback, images, loaders

class Sometimes(nn.Module):
    "A layer that is left out by chance: then its parameters have no gradient, or an old one of zero (DDP does not allow it)"
    def __init__(self): super().__init__(); self.layer = nn.Linear(8,8)
    def forward(self, x): return self.layer(x) if torch.rand(1)<.4 or world_size()>1 else x

def encoder(): return nn.Sequential(nn.Conv2d(1,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Sometimes())

def make(folder, name='swav', seed=42, dls=None, cb=None, cbs=(), steps=3, keep=2, **kwargs):
    "A small run: 5 batches an epoch, a queue that fills in the second step, dropout, batch norm, a shuffled order"
    set_seed(seed)
    dls = loaders(name, images(), images(12), bs=8, seed=seed) if dls is None else dls()
    cb  = callback(name, augs(name)) if cb is None else cb()
    return Learner(dls, methods.model(name, enc=encoder()), cbs=[cb, Checkpoint(folder, minutes=None, steps=steps, keep=keep), *[o() for o in cbs]], path=folder, **kwargs)

def fit_alone(learn, n=3):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, 1e-2)

def fit(learn, n=3):
    "After an error, what is still being written is waited for"
    try: fit_alone(learn, n)
    except BaseException:
        if hasattr(learn, 'checkpoint'): learn.checkpoint.files
        raise

def outcome(learn):
    "Everything that a run leaves behind"
    return dict(weights={k:v.clone() for k,v in learn.model.state_dict().items()}, losses=torch.stack(list(learn.recorder.losses)).clone(), lrs=list(learn.recorder.lrs),
                values=[list(o) for o in learn.recorder.values], opt={f'{i}.{k}':v for i,s in enumerate(learn.opt.state_dict()['state']) if isinstance(s, dict) for k,v in s.items()})

def same(a, b):
    if isinstance(a, dict): return set(a)==set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(same(x, y) for x,y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a==b

class Die(Watcher):
    "Raise in the `nth` call of `event`"
    def __init__(self, event, nth): self.event,self.nth = event,nth
    def __call__(self, event):
        super().__call__(event)
        if event==self.event:
            self.nth -= 1
            if self.nth==0: raise KeyboardInterrupt

def go_on(folder, fit=fit, **kwargs):
    learn = make(folder, seed=7, **kwargs)
    learn.resume(missing_ok=True)
    fit(learn)
    return learn

def check(tmp_path, event='after_pred', nth=9, fit=fit, want=None, **kwargs):
    "A run that dies and goes on in a new Learner, with other weights and random numbers, equals one that does not"
    whole = None
    if want is None: fit(whole := make(tmp_path/'whole', **kwargs)); want = outcome(whole)
    dying = make(tmp_path/'dying', **kwargs)
    dying.add_cb(Die(event, nth))
    with pytest.raises(KeyboardInterrupt): fit(dying)
    assert dying.checkpoint.files
    learn = go_on(tmp_path/'dying', fit, **kwargs)
    assert same(want, outcome(learn))
    return whole,learn


# Goes on exactly

@pytest.fixture(scope='module')
def whole_runs(tmp_path_factory):
    "What a run of a method gives that nobody kills"
    res = {}
    def _get(name):
        if name not in res: fit(learn := make(tmp_path_factory.mktemp('whole'), name)); res[name] = outcome(learn)
        return res[name]
    return _get

anywhere = [('before_batch', 5), ('after_backward', 6), ('after_step', 5), ('before_validate', 1), ('after_epoch', 2), ('before_epoch', 3)]

# all events for one method; the others in an epoch and between two
@pytest.mark.parametrize('name,event,nth', [(nm,*o) for nm in methods.methods for i,o in enumerate(anywhere) if nm=='swav' or i in (1,3)])
def test_anywhere(tmp_path, whole_runs, name, event, nth): check(tmp_path, event, nth, want=whole_runs(name), name=name)

def test_nothing_saved_yet(tmp_path):
    dying = make(tmp_path, steps=100)
    dying.add_cb(Die('after_batch', 2))
    with pytest.raises(KeyboardInterrupt): fit(dying)
    assert not dying.checkpoint.files and make(tmp_path).resume(missing_ok=True) is None
    with pytest.raises(ValueError, match='there is no checkpoint in .*missing_ok=True'): make(tmp_path).resume()

@pytest.mark.parametrize('kwargs', [
    dict(cbs=[partial(GradientAccumulation, 24)], steps=1, nth=8), # a checkpoint between two optimizer steps, with half of the gradient
    dict(cbs=[partial(GradientClip, .1)]), dict(opt_func=partial(SGD, mom=.9)), dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),
    dict(cb=lambda: SWAV(augs('swav'), [0,1], K=12, freeze_prototypes_niters=7), steps=1), # the first loss of the prototypes' gradient comes later
    dict(cb=lambda: SWAV(augs('swav'), [0,1], K=None, hard_codes=True)), dict(keep=1)],
    ids=['accumulate','clip','sgd','adamw','frozen','hard','keep1'])
def test_settings(tmp_path, kwargs): check(tmp_path, **kwargs)

@pytest.mark.parametrize('nth,done', [(8,2), (7,2), (5,1)], ids=['within','step','first'])
def test_steps_that_are_counted(tmp_path, nth, done):
    "Prototypes are fixed for three optimizer steps of three batches each; whether a run dies between two of them or just after one, they move in the same step"
    moved = []
    class Look(Watcher):
        def after_batch(self):
            if self.training: moved.append((self.learn.swav.steps_done, self.learn.model.prototypes.weight.clone()))
    kwargs = dict(cb=lambda: SWAV(augs('swav'), [0,1], K=None, freeze_prototypes_niters=3), cbs=[partial(GradientAccumulation, 24), Look], steps=1)
    whole,learn = check(tmp_path, 'after_backward', nth, **kwargs)
    whole_run,again = moved[:15],moved[15+nth-1:] # the last one did not come to its end
    assert [o for o,_ in whole_run]==[i//3 for i in range(1, 16)] and len(again)==15-(nth-1) and again[0][0]==nth//3
    assert [torch.equal(whole_run[0][1], o) for _,o in whole_run]==[i<12 for i in range(1, 16)]
    assert same(whole_run[nth-1:], again) and learn.swav.steps_done==whole.swav.steps_done==5 and read_checked(learn.checkpoint.files[0])['cbs']['swav']['steps_done']>=done

def test_a_batch_is_no_state(tmp_path):
    "What a class calls transient is left out, of methods and of any other callback; the file holds nothing of the views"
    class Held(Watcher):
        transient = ('scores',)
        def __init__(self): self.scores,self.n = None,0
        def after_pred(self): self.scores,self.n = self.pred[1],self.n+1
    fit(learn := make(tmp_path, steps=1, cbs=[Held]), 1)
    for nm,cbs in (('swav', {'views','target','last_codes','now'}), ('held', {'scores'})):
        saved = read_checked(learn.checkpoint.files[-2])['cbs'][nm]
        assert not cbs & set(saved) and saved['n' if nm=='held' else 'steps_done']==4
    class Loud(SWAV): transient = (*SWAV.transient, 'loud')
    cb = Loud(augs('swav'), [0,1]); cb.loud = 1
    assert 'loud' not in state_of(cb) and set(state_of(cb))==set(state_of(SWAV(augs('swav'), [0,1])))

class Noted(Watcher):
    "State of all kinds, from which the numbers of the next step are made"
    class Mood(Enum): low,high = 1,2
    def __init__(self):
        self.sums,self.seen,self.last,self.where,self.mood = np.zeros((2,3), np.float32)[:,::-1],set(),deque(maxlen=2),Path('0'),Noted.Mood.low
        self.rng,self.rng2 = np.random.default_rng(1),random.Random(2)
        self.rng3,self.rng4,self.weight = torch.Generator().manual_seed(3),np.random.RandomState(4),nn.Parameter(torch.zeros(1))
        self.held = self.weight
    def after_batch(self):
        if not self.training: return
        x = self.rng.random() + self.rng2.random() + float(torch.rand(1, generator=self.rng3)) + self.rng4.rand()
        self.sums[:] = .5*self.sums+x
        self.seen.add(round(x, 3)); self.last.append(x); self.where = Path(f'{self.sums.sum():.4f}'); self.mood = Noted.Mood(1+len(self.seen)%2)
        with torch.no_grad(): self.weight += x

def test_state_of_all_kinds(tmp_path):
    "Arrays, sets, paths, queues, generators: what comes out is the same, and of the same kind"
    whole,learn = check(tmp_path, cbs=[Noted])
    a,b = whole.noted,learn.noted
    assert np.array_equal(a.sums, b.sums) and b.sums.dtype==np.float32 and type(b.sums) is np.ndarray and a.sums.sum()>0
    assert a.seen==b.seen and type(b.seen) is set and len(b.seen)==15
    assert a.last==b.last and b.last.maxlen==2 and a.where==b.where and isinstance(b.where, Path) and a.mood is b.mood
    assert torch.equal(a.weight, b.weight) and b.held is b.weight # whoever holds on to it, as an optimizer does, has it still
    assert a.rng.random()==b.rng.random() and a.rng4.rand()==b.rng4.rand()

@pytest.mark.parametrize('o', [np.arange(6).reshape(2,3), np.array(2.5), np.zeros((0,3)), np.arange(4.)[::-2], np.array([1,2], '>i4'), np.array([1,2], np.uint16), np.array([True]), np.array([1j]),
    np.array([['a','bc']]), np.array([b'a']), {1,'a'}, frozenset({(1,2)}), Path('a/b'), deque([np.ones(2), {1}]), {'set':[1]}, {'cpu':1}, {'a':{'path':'x'}}, {Path('a'):1, 2:3}, {(Path('a'),1):np.ones(1)},
    b'\0', 1+2j, [{1}, (Path('.'),)], None, [], {}, float('inf'), 2**70], ids=lambda o: type(o).__name__) # the words of a set have another order in each process
def test_plain_and_back(tmp_path, o):
    "Through a file, which holds tensors, numbers, strings, lists and dicts only"
    write_atomic(plain(o), tmp_path/'x')
    def equal(a, b):
        if isinstance(a, np.ndarray): return type(b) is np.ndarray and a.dtype==b.dtype and a.shape==b.shape and np.array_equal(a, b)
        if isinstance(a, (list,tuple,deque)): return type(a)==type(b) and len(a)==len(b) and all(map(equal, a, b))
        if isinstance(a, dict): return type(b) is dict and list(a)==list(b) and all(equal(a[k], b[k]) for k in a)
        return type(a)==type(b) and a==b
    assert equal(o if not (isinstance(o, np.ndarray) and o.dtype.byteorder=='>') else o.astype('i4'), restored(read_checked(tmp_path/'x')))

class Unknown: pass

@pytest.mark.parametrize('what,named', [(np.array([None]), 'ndarray'), (np.ma.array([1,2], mask=[0,1]), 'MaskedArray'), (Unknown(), 'Unknown'), ([1, {'a':Unknown()}], 'Unknown'), (iter([1]), 'list_iterator'),
    (torch.optim.SGD([torch.zeros(1)], .1), 'SGD'), (nn.Linear(1,1), None), (len, None), (np.less, None), ([len, nn.ReLU()], None), (tensor_dls(images(), bs=8), None), (Unknown, None), (object(), None), (os, None)],
    ids=lambda o: type(o).__name__ if o is not None and not isinstance(o, str) else str(o))
def test_what_is_left_out_is_named(tmp_path, what, named):
    "Once, with callback, attribute and class; tools are none of it"
    class Held(Watcher):
        def __init__(self): self.thing = what
    learn = make(tmp_path, steps=1, cbs=[Held])
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        fit(learn, 1)
    said = [str(o.message) for o in w if 'checkpoint' in str(o.message)]
    assert len(said)==bool(named) and (not named or f'Held.thing holds a {named}' in said[0])
    class Passing(Held): transient = ('thing',)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        state_of(Passing())

def test_callbacks_make_no_noise(tmp_path):
    "Those of fastai, and ours, hold nothing that is named"
    from fastai.callback.all import CSVLogger, ReduceLROnPlateau, TerminateOnNaNCallback
    from self_supervised.diagnostics import CollapseMonitor
    labelled = tensor_dls((images(),torch.arange(40)%2), (images(12),torch.arange(12)%2), bs=8)
    from self_supervised.online import OnlineKNN
    some = [partial(CSVLogger, tmp_path/'x.csv'), ReduceLROnPlateau, TerminateOnNaNCallback, CollapseMonitor, partial(OnlineKNN, labelled), partial(SaveModelCallback, with_opt=False), EarlyStoppingCallback, GradientClip]
    for name in methods.methods:
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            fit(make(tmp_path/name, name, steps=1, cbs=some), 1)
        assert not [o for o in w if 'checkpoint' in str(o.message)]

def test_devices():
    "What was on the CPU beside a model on a GPU stays there, all else goes to the model; here the other device is `meta`"
    class Bank(Callback):
        def __init__(self): self.bank,self.counts = torch.ones(2),[torch.tensor(1.),torch.tensor(2.)]
    cb = Bank()
    on_gpu,on_cpu = state_of(cb, 'cuda'),state_of(cb)
    for saved,want in ((on_gpu, 'cpu'), (on_cpu, 'meta')):
        set_state(cb, saved, 'meta')
        assert {o.device.type for o in (cb.bank, *cb.counts)}=={want}
    set_state(cb, {'counts':{'stacked':torch.ones(2)}}, 'meta') # as version 0.8 wrote it
    assert len(cb.counts)==2 and cb.counts[0].device.type=='meta'

def test_recorder_stays_on_the_cpu(tmp_path, monkeypatch):
    "fastai's numbers are there whatever the model is on; else `plot_loss` would fail after a run that went on"
    at = {}
    old = checkpoint.set_state
    monkeypatch.setattr(checkpoint, 'set_state', lambda o, s, device='cpu': (at.__setitem__(type(o), device), old(o, s)))
    monkeypatch.setattr(checkpoint, '_device', lambda m: torch.device('meta'))
    monkeypatch.setattr(checkpoint, 'state_of', lambda o, device='cpu': state_of(o))
    monkeypatch.setattr(checkpoint, 'restored', lambda o, device='cpu': restored(o))
    learn = make(tmp_path); fit(learn)
    again = make(tmp_path); again.resume(); fit(again)
    assert at[Recorder]=='cpu' and at[SWAV]==torch.device('meta') and at[TrainEvalCallback]==torch.device('meta')
    again.recorder.plot_loss()

def test_generators_of_gpus():
    "A process has the generator of its own GPU again, on a node of more or fewer"
    for (n_then,gpu),(n_now,own) in (((8,3),(1,0)), ((1,0),(8,5)), ((8,3),(8,3)), ((8,3),(2,1))):
        got = checkpoint._gpu_states([f'{i}' for i in range(n_then)], gpu, own, n_now)
        assert len(got)==n_now and got[own]==f'{gpu}'
    assert checkpoint._gpu_states([], 0, 0, 2)==[] # saved without

def test_validation_changes_nothing_that_is_saved_before_it(tmp_path):
    "An array or a tensor of a callback that validation writes into"
    class Counted(Watcher):
        def __init__(self): self.n,self.m = torch.zeros(1),np.zeros(1)
        def after_batch(self): self.n += 1; self.m += 1
    learn = make(tmp_path, cbs=[Counted]); seen = []
    class Look(Watcher):
        order = 101
        def after_batch(self):
            if not self.training and self.learn.checkpoint._end: seen.append(deepcopy(self.learn.checkpoint._end['cbs']['counted']))
    learn.add_cb(Look()); fit(learn, 1)
    assert learn.counted.n==7 and seen and all(o['n']==5 and o['m']['array']==5 for o in seen)

class Scaled(Watcher):
    "Stands in for `MixedPrecision`, whose scaler does nothing without a GPU"
    def before_fit(self):
        super().before_fit()
        self.learn.scaler = torch.amp.GradScaler('cpu')
    def before_backward(self): self.learn.loss_grad = self.learn.scaler.scale(self.learn.loss_grad)/2**16
    def after_step(self): self.learn.scaler.update(1.1*self.learn.scaler.get_scale())

def test_scaler(tmp_path):
    whole,learn = check(tmp_path, cbs=[Scaled])
    assert whole.scaler.state_dict()==learn.scaler.state_dict() and whole.scaler.get_scale()>2**16

def test_callbacks(tmp_path):
    "The best value and the patience so far are part of the run; so is what a callback says of itself"
    class Own(Watcher):
        def __init__(self): self.net = nn.Linear(1,1)
        def after_batch(self): self.net.weight.data += self.loss.detach()
        def state_dict(self): return self.net.state_dict()
        def load_state_dict(self, o): self.net.load_state_dict(o)
    whole,learn = check(tmp_path, 'after_epoch', 3, partial(fit, n=4), cbs=[partial(SaveModelCallback, with_opt=False), partial(EarlyStoppingCallback, patience=99), Own])
    assert whole.save_model.best==learn.save_model.best and whole.early_stopping.wait==learn.early_stopping.wait
    assert torch.equal(whole.own.net.weight, learn.own.net.weight)
    assert whole.save_model.best==min(o[1] for o in whole.recorder.values) # and it is a value of the whole run

def test_columns(tmp_path):
    "What a callback showed in the table in the first epoch, it still shows"
    class Once(Watcher):
        columns = ('once',)
        def after_train(self):
            if self.epoch==0: self.now['once'] = 7
    whole,learn = check(tmp_path, cbs=[Once])
    assert [o[2] for o in learn.recorder.values]==[7]*3

def test_finished(tmp_path):
    "A finished run that is started again does nothing and has its results"
    whole = make(tmp_path); fit(whole)
    files = {o:o.stat().st_mtime_ns for o in whole.checkpoint.files}
    learn = go_on(tmp_path)
    assert same(outcome(whole), outcome(learn)) and {o:o.stat().st_mtime_ns for o in learn.checkpoint.files}==files

def test_several_fits(tmp_path):
    "Those that were finished are passed over; `lr_find` and `validate` are no fits"
    def script(learn):
        with learn.no_bar(), learn.no_logging():
            learn.lr_find(num_it=5, show_plot=False, suggest_funcs=None)
            learn.fit_one_cycle(2, 1e-2); learn.validate(); learn.swav.temp = .2; learn.fit_one_cycle(2, 1e-3)
    check(tmp_path, 'after_backward', 5+10+8, script)

def test_saving_changes_nothing(tmp_path):
    a = make(tmp_path/'a', steps=1); fit(a)
    b = make(tmp_path/'b'); b.remove_cb(b.checkpoint); fit(b)
    assert same(outcome(a), outcome(b))

def test_when(tmp_path, monkeypatch):
    "By steps, by epochs, by the clock; the newest stay; `validate` saves nothing"
    names = lambda learn: [int(o.stem[-9:]) for o in learn.checkpoint.files]
    learn = make(tmp_path/'steps', steps=4, keep=9); fit(learn); assert names(learn)==[4, 8, 12, 15]
    learn.validate(); assert names(learn)==[4, 8, 12, 15]
    learn = make(tmp_path/'keep', steps=4, keep=2); fit(learn); assert names(learn)==[12, 15]
    learn = make(tmp_path/'epochs', steps=None, keep=9); learn.checkpoint.epochs = 2; fit(learn); assert names(learn)==[10, 15]
    now = [0.]
    monkeypatch.setattr('self_supervised.checkpoint.time.monotonic', lambda: now.__setitem__(0, now[0]+60) or now[0])
    learn = make(tmp_path/'clock', steps=None, keep=9); learn.checkpoint.minutes = 3.5; fit(learn)
    assert len(names(learn))>=3 and names(learn)[-1]==15

class Shake(RandTransform):
    "A random step on each item"
    def __init__(self): super().__init__(p=1.)
    def encodes(self, x:torch.Tensor): return (x.float()+10*torch.rand(1)).clamp(0,255).to(torch.uint8)

class Torch(torch.utils.data.Dataset):
    def __len__(self): return 40
    def __getitem__(self, i): return (images()[i].float()/255*torch.rand(1), i)

def items(workers, *steps): return Datasets(list(range(40)), [[lambda i: images()[i], *[o() for o in steps]]], splits=[list(range(40)), []]).dataloaders(bs=8, num_workers=workers, shuffle=True, device='cpu')

@pytest.mark.parametrize('dls', [partial(items, 0, Shake), partial(items, 2), partial(items, 2, Shake),
    lambda: DataLoaders(torch.utils.data.DataLoader(Torch(), 8, shuffle=True), torch.utils.data.DataLoader(Torch(), 8))], ids=['random','workers','random-workers','torch'])
def test_loaders(tmp_path, dls):
    "The same items in the same order with the same noise, whatever reads them"
    check(tmp_path, dls=dls, **(dict(loss_func=nn.MSELoss())), fit=partial(fit, n=2))

def test_skips_or_reads_again():
    "Batches that are left out are not read where that changes nothing, and read where it might"
    for dls,read in ((items(0, Shake), 8), (DataLoaders(torch.utils.data.DataLoader(Torch(), 8)), 40)):
        begin = rng_states(dls)
        it = iter(dls.train); [next(it) for _ in range(4)]; now = rng_states(dls); want = next(it)[0]
        seen,get = [],type(dls.train.dataset).__getitem__
        with pytest.MonkeyPatch.context() as m:
            m.setattr(type(dls.train.dataset), '__getitem__', lambda self,i: seen.append(i) or get(self, i))
            got = [b[0] for b in batches_after(dls.train, dls, 4, begin, now)]
        assert len(got)==1 and torch.equal(got[0], want) and len(seen)==read


def test_nothing_stays_in_the_loader(tmp_path):
    "An error in a resumed epoch, even if somebody keeps it, leaves a loader that begins at the beginning"
    dying = make(tmp_path, steps=1); dying.add_cb(Die('after_pred', 3))
    with pytest.raises(KeyboardInterrupt): fit(dying)
    learn = make(tmp_path); learn.resume(); learn.add_cb(Die('after_pred', 1))
    dl = learn.dls.train
    with pytest.raises(KeyboardInterrupt) as kept: fit(learn)
    assert kept.traceback and not {'get_idxs','first_batch'} & set(vars(dl)) and 'generator' not in vars(dl.fake_l)
    assert len(list(dl))==5

def test_queue_wherever_it_is():
    "It is known by its class: it takes the size of the file, and what only has its name does not"
    def net(n, q=None):
        m = nn.ModuleDict(dict(bank=nn.ModuleDict(dict(old=FeatureQueue(9))), body=nn.Linear(2,3), queue=nn.Module()))
        m.queue.register_buffer('feats', torch.zeros(q or 1))
        m.bank.old.push(torch.rand(2,n,3))
        return m
    a,b = net(4),net(7)
    load_model(b, a.state_dict(), 'x.ckpt')
    assert torch.equal(a.bank.old.feats, b.bank.old.feats) and b.bank.old.feats.shape==(2,4,3)
    with pytest.raises(ValueError, match=r'x.ckpt holds another model than this Learner: queue.feats: 1 → 2\. Build'): load_model(net(4,2), a.state_dict(), 'x.ckpt')


# Refusals

def test_what_is_no_setting(tmp_path):
    "A callback that says so may come and go; any other may not"
    class Free(Callback):
        is_setting = False
        def __init__(self, often=1): self.often = often
    class Bound(Free): is_setting = True
    learn = make(tmp_path, steps=1, cbs=[Free]); learn.add_cb(Die('after_pred', 3))
    with pytest.raises(KeyboardInterrupt): fit(learn)
    assert not any(k.startswith(('free','checkpoint','die','recorder')) for k in run_settings(learn))
    learn = make(tmp_path, steps=None, cbs=[partial(Free, 3)]); learn.resume(); fit(learn)
    learn = make(tmp_path, cbs=[Bound]); learn.resume()
    with pytest.raises(ValueError, match='bound.often: None → 1'): fit(learn)

def other_crops(): return callback('swav', augs('swav', size=10))

@pytest.mark.parametrize('kwargs,n,msg', [
    (dict(cb=lambda: SWAV(augs('swav'), [0,1], K=8, queue_start_pct=0.)), 3, r'swav.K: 12 → 8'),
    (dict(cb=other_crops), 3, r"swav.aug_pipelines\[0\]\[0\]: RandomCropResize .*'size': \(12, 12\).*→.*\(10, 10\)"),
    (dict(opt_func=SGD), 3, r'optimizer'), ({}, 4, r'n_epoch: 3 → 4'),
    (dict(dls=lambda: tensor_dls(images(), images(12), bs=4, seed=1)), 3, r'bs: 8 → 4'), (dict(cbs=[GradientClip]), 3, r'gradient_clip.max_norm: None → 1.0')])
def test_other_settings(tmp_path, kwargs, n, msg):
    learn = make(tmp_path); learn.add_cb(Die('after_pred', 7))
    with pytest.raises(KeyboardInterrupt): fit(learn)
    before = {o:o.read_bytes() for o in learn.checkpoint.files}
    other = make(tmp_path, **kwargs)
    other.resume()
    with pytest.raises(ValueError, match=r'other settings.*\n(.*\n)*  '+msg) as e: fit(other, n)
    assert {o:o.read_bytes() for o in other.checkpoint.files}==before
    names = json.loads(str(e.value).split('override=')[1].rstrip(')').replace("'", '"'))
    again = make(tmp_path, **kwargs)
    again.resume(override=names); fit(again, n) # allowed by the names that the refusal shows
    assert again.epoch==n-1 and np.isfinite(again.recorder.losses[-1])
    if 'swav.K' in names: assert again.swav.K==8 and again.model.queue.feats.shape[1]==8

# Other images, other layers

def files(folder, n=20, seed=0, size=20):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.fromarray(np.random.default_rng([seed,i]).integers(0, 255, (size,size), dtype=np.uint8)).save(folder/f'{i:02}.png')
    return folder

def from_files(folder, **kwargs): return lambda: image_dls(folder, **{**dict(size=16, bs=4, n_in=1, num_workers=0), **kwargs})

def interrupted(folder, dls, n=3, **kwargs):
    learn = make(folder, dls=dls, steps=1, **kwargs); learn.add_cb(Die('after_pred', n))
    with pytest.raises(KeyboardInterrupt): fit(learn)

def resumed(folder, dls, override=(), **kwargs):
    learn = make(folder, dls=dls, **kwargs); learn.resume(override); fit(learn)
    return learn

class Pairs(torch.utils.data.Dataset):
    "A dataset of PyTorch"
    def __init__(self, n=20, size=16): self.n,self.size = n,size
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full((1,self.size,self.size), i, dtype=torch.uint8),0
class Held(Pairs):
    def __init__(self, x): self.data = x.numpy(); self.n = len(x)
    def __getitem__(self, i): return torch.tensor(self.data[i]),0
def torch_dls(ds, **kwargs): return lambda: DataLoaders(torch.utils.data.DataLoader(ds, **{**dict(batch_size=4, shuffle=True), **kwargs}), [])
def half(ds, seed): return torch.utils.data.Subset(ds, np.random.default_rng(seed).permutation(20)[:12])
def images2(n=20, seed=1, **kwargs): return images(n)//2 if seed else images(n)
def in_table(nm): return Datasets(__import__('pandas').DataFrame({'file':[f'{nm}/{i}.png' for i in range(20)], 'n':range(20)}), [[lambda r: images()[r['n']]]]).dataloaders
def by_items(splits): return lambda: Datasets(list(range(20)), [[lambda i: images()[i]]], splits=splits).dataloaders(bs=4, device='cpu')

@pytest.mark.parametrize('was,now,named', [
    (from_files('a'), from_files('b'), 'data.contents'), (from_files('a'), from_files('e'), 'data.sizes'), (from_files('a'), from_files('c'), 'images: 20 → 24'), (from_files('a'), from_files('d'), 'data.names'),
    (from_files('a'), from_files('a', size=12), r'item\[0\]\[1\]: 16 → 12'),
    (from_files('a', valid_pct=.4, seed=1), from_files('a', valid_pct=.4, seed=2), 'data.names'),
    (lambda: tensor_dls(images(), bs=8), lambda: tensor_dls(images2(40), bs=8), 'data.pixels'), (lambda: tensor_dls(images(), bs=8), lambda: tensor_dls(images().repeat(1,1,2,2), bs=8), r'item\[0\]\[1\]: 14 → 28'),
    (lambda: tensor_dls(images(), bs=8), lambda: tensor_dls(images()/255, bs=8), 'torch.uint8 → torch.float32'),
    (torch_dls(Pairs()), torch_dls(Pairs(24), batch_size=4, drop_last=True), 'data.n: 20 → 24'), (torch_dls(Pairs()), torch_dls(Pairs(size=20)), r'item\[0\]\[1\]: 16 → 20'),
    (torch_dls(Held(images(20))), torch_dls(Held(images2())), 'data.pixels'), (torch_dls(half(Pairs(), 1)), torch_dls(half(Pairs(), 2)), 'data.indices'),
    (torch_dls(Pairs()), torch_dls(Pairs(), shuffle=False), r'loader\[1\]: True → False'),
    (torch_dls(torch.utils.data.ConcatDataset([Held(images(10)),Held(images(10))])), torch_dls(torch.utils.data.ConcatDataset([Held(images(10)),Held(images2(10))])), r'data.parts\[1\].pixels'),
    (by_items([list(range(12)), [12]]), by_items([list(range(8,20)), [1]]), 'data.values'),
    (lambda: in_table('t')(bs=4, device='cpu'), lambda: in_table('b/c/../d')(bs=4, device='cpu'), None), (lambda: in_table('t')(bs=4, device='cpu'), lambda: in_table('t/x')(bs=4, device='cpu'), None)],
    ids='contents sizes more names size split pixels shape dtype torch-n torch-size torch-data subset order concat items moved-table deeper-table'.split())
def test_other_images(tmp_path, monkeypatch, was, now, named):
    monkeypatch.chdir(tmp_path)
    files(tmp_path/'a'); files(tmp_path/'b', seed=1); files(tmp_path/'c', 24); files(tmp_path/'e', size=24); files(tmp_path/'d')
    (tmp_path/'d'/'07.png').rename(tmp_path/'d'/'7.png')
    kwargs = dict(loss_func=nn.MSELoss())
    interrupted(tmp_path/'run', was, **kwargs)
    if named is None: resumed(tmp_path/'run', now, **kwargs); return
    with pytest.raises(ValueError, match='other settings(.|\n)*  '+named.replace('torch.uint8 →', '.*torch.uint8 →')) as e: resumed(tmp_path/'run', now, **kwargs)
    names = json.loads(str(e.value).split('override=')[1].rstrip(')').replace("'", '"'))
    assert set(names)<={'data','item','loader','opened'}
    learn = resumed(tmp_path/'run', now, names, **kwargs)
    assert learn.epoch==2 and learn.checkpoint.last_saved==learn.checkpoint.files[-1]

def test_moved_and_grown(tmp_path):
    "The folder may move, a link may stand for it; a run goes on exactly"
    files(tmp_path/'a'/'x'/'y')
    whole = make(tmp_path/'whole', dls=from_files(tmp_path/'a')); fit(whole)
    interrupted(tmp_path/'run', from_files(tmp_path/'a'))
    (tmp_path/'a').rename(tmp_path/'b'); (tmp_path/'c').symlink_to(tmp_path/'b')
    assert same(outcome(whole), outcome(resumed(tmp_path/'run', from_files(tmp_path/'c'))))

def test_to_look_at_an_item_leaves_no_trace(tmp_path):
    "Neither in the generators, nor in a dataset that is read by workers; and an item that cannot be had is no error"
    read = []
    class Watched(Pairs):
        bad = False
        def __getitem__(self, i):
            read.append(i)
            if self.bad: raise OSError('broken')
            return torch.full((1,16,16), int(torch.randint(9, (1,)))+random.randint(0,9)+np.random.randint(9), dtype=torch.uint8),0
    learn = make(tmp_path, dls=torch_dls(Watched()), loss_func=nn.MSELoss())
    learn.n_epoch = 1; learn.create_opt()
    before = deepcopy(rng_states([]))
    assert run_settings(learn)['item']==[[1,16,16], 'torch.uint8'] and read==[0] and same(before, rng_states([]))
    Watched.bad = True
    assert run_settings(learn)['item'] is None and same(before, rng_states([]))
    learn.dls = torch_dls(Watched(), num_workers=1)(); read.clear()
    assert run_settings(learn)['item'] is None and not read # it might open its file here, and use it in the worker

def test_other_images_begin_the_epoch_anew(tmp_path, capsys):
    "Allowed, 12 of 20 images are left: the epoch that was interrupted has 3 batches of them, and so have those that follow; in validation it is not begun again"
    files(tmp_path/'a')
    for nth,want in ((8,[0,1,2]*2), (14,[0,1,2])): # in the second epoch, after two of five batches; in the second, within the validation of the first
        run = tmp_path/f'run{nth}'
        files(tmp_path/'a')
        learn = make(run, dls=from_files(tmp_path/'a'), steps=1); learn.add_cb(Die('after_pred', nth if nth==8 else 11))
        if nth==14: learn.add_cb(Die('after_epoch', 1))
        with pytest.raises(KeyboardInterrupt): fit(learn)
        for i in range(12, 20): (tmp_path/'a'/f'{i}.png').unlink()
        seen = []
        class Look(Watcher):
            def after_batch(self):
                if self.training: seen.append((self.epoch, self.iter, round(self.pct_train, 6)))
        again = make(run, dls=from_files(tmp_path/'a')); again.add_cb(Look()); again.resume('data'); fit(again)
        assert [o[:2] for o in seen]==[(e,i) for e in (1,2) for i in range(3)]
        assert [o[2] for o in seen]==pytest.approx([(e+(i+1)/3)/3 for e in (1,2) for i in range(3)], abs=1e-5) # the schedule is where the epochs are
        assert ('epoch 1 begins anew' in capsys.readouterr().out)==(nth==8)

def test_what_is_kept_for_each_image(tmp_path):
    "is not put back when images are others"
    class Bank(Watcher):
        per_image = ('rows',)
        def __init__(self): self.rows,self.n = None,0
        def before_train(self):
            if self.rows is None: self.rows = torch.zeros(self.dls.train.n)
        def after_batch(self): self.n += 1; self.rows += self.training
    interrupted(tmp_path/'run', lambda: tensor_dls(images(), bs=8), 4, cbs=[Bank])
    learn = resumed(tmp_path/'run', lambda: tensor_dls(images(24), bs=8), 'data', cbs=[Bank])
    assert learn.bank.rows.tolist()==[9]*24 and learn.bank.n==3+9

@pytest.mark.parametrize('change,named', [(lambda m: m.encoder.__setitem__(2, nn.SiLU()), r'model.encoder.2: ReLU\(\) → SiLU\(\)'), (lambda m: m.encoder.__setitem__(3, nn.Dropout(.5)), r'model.encoder.3: Dropout\(p=0.2.* → Dropout\(p=0.5'),
    (lambda m: m.encoder.__setitem__(4, nn.AdaptiveMaxPool2d(1)), 'AdaptiveAvgPool2d.* → AdaptiveMaxPool2d'), (lambda m: setattr(m.encoder[1], 'eps', 1e-3), 'eps=1e-05.* → .*eps=0.001'),
    (lambda m: m.encoder.append(nn.Identity()), r'model.encoder.7: None → Identity\(\)')], ids=['activation','dropout','pool','eps','more'])
def test_other_layers(tmp_path, change, named):
    "that have no weights to tell them by"
    learn = make(tmp_path); learn.add_cb(Die('after_pred', 7))
    with pytest.raises(KeyboardInterrupt): fit(learn)
    other = make(tmp_path); change(other.model); other.resume()
    with pytest.raises(ValueError, match=named) as e: fit(other)
    assert str(e.value).endswith("learn.resume(override=['model'])")
    other = make(tmp_path); change(other.model); other.resume('model'); fit(other)

def test_wrappers_come_and_go(tmp_path):
    "`torch.compile`, of the whole or a part, and gradient checkpointing are no other layers: the run is the same"
    whole = make(tmp_path/'whole'); fit(whole)
    def compiled(learn): learn.model = torch.compile(learn.model, backend='eager')
    def checkpointed(learn): learn.model.encoder = checkpoint_encoder(learn.model.encoder)
    for i,(first,then) in enumerate(((compiled, checkpointed), (checkpointed, compiled))):
        folder = tmp_path/f'{i}'
        learn = make(folder); first(learn); learn.add_cb(Die('after_pred', 7))
        with pytest.raises(KeyboardInterrupt): fit(learn)
        learn = make(folder, seed=1); then(learn); learn.resume(); fit(learn)
        got = {k.removeprefix('_orig_mod.'):v for k,v in learn.model.state_dict().items()}
        assert all(torch.allclose(v, got[k], atol=1e-5) for k,v in whole.model.state_dict().items())

def test_long_differences_are_cut(tmp_path):
    learn = make(tmp_path); fit(learn)
    a = run_settings(learn)
    b = {**a, 'model':{f'{i}':'x' for i in range(99)}}
    with pytest.raises(ValueError, match='and [0-9]+ more\n') as e: checkpoint.check_settings(a, b, [], 'x')
    assert len(str(e.value).splitlines())<25

def test_checkpoint_of_an_earlier_version(tmp_path):
    "It knows neither images nor layers, and of a loader of PyTorch neither size nor batch: it goes on, with one notice"
    for dls,kwargs in ((None, {}), (torch_dls(Pairs()), dict(loss_func=nn.MSELoss()))):
        folder = tmp_path/str(dls is None)
        interrupted(folder, dls, **kwargs)
        f = max(folder.glob('*.ckpt')); s = read_checked(f)
        for k in ('data','item','loader','model'): del s['settings'][k]
        if dls: s['settings'] |= dict(images=None, bs=None)
        write_atomic(s, f)
        with pytest.warns(UserWarning, match='whether they are the same is not known'): resumed(folder, dls, **kwargs)


# A run that has diverged

def spoil(what):
    class Spoil(Watcher):
        def after_step(self):
            if self.train_iter!=8: return
            with torch.no_grad():
                if what=='weight': self.model.encoder[0].weight[0] = float('nan')
                elif what=='infinite': self.model.encoder[0].weight[0] = float('inf')
                elif what=='buffer': self.model.encoder[1].running_mean[0] = float('nan')
                else: next(v for s in self.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.ndim)[0] = float('nan')
    return Spoil

@pytest.mark.parametrize('what', ['weight','infinite','buffer','optimizer'])
def test_diverged(tmp_path, what):
    "is not saved, and no good file makes room for it; the last one is named"
    learn = make(tmp_path, cbs=[spoil(what)])
    assert learn.checkpoint.last_saved is None
    with pytest.raises(FloatingPointError, match='diverged.*The last good checkpoint is .*fit01-step000000006.ckpt'): fit(learn)
    assert [int(o.stem[-9:]) for o in learn.checkpoint.files]==[3,6] and learn.checkpoint.last_saved.name=='fit01-step000000006.ckpt'
    again = make(tmp_path); again.resume(); fit(again)
    assert all(o.isfinite().all() for o in again.model.state_dict().values())

def test_infinite_masks_are_no_divergence(tmp_path):
    learn = make(tmp_path)
    learn.model.encoder[0].register_buffer('mask', torch.tensor([0., -float('inf')]))
    learn.checkpoint.learn.create_opt(); learn.checkpoint._check_finite()

def test_other_schedule(tmp_path):
    learn = make(tmp_path); learn.add_cb(Die('after_pred', 7))
    with pytest.raises(KeyboardInterrupt): fit(learn)
    def slower(learn):
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-4)
    learn = make(tmp_path); learn.resume()
    with pytest.raises(ValueError, match=r'param_scheduler.lr'): slower(learn)
    learn = make(tmp_path); learn.resume('param_scheduler.lr'); slower(learn)
    assert max(learn.recorder.lrs[6:])<=1e-4

def test_other_hypers(tmp_path):
    def decayed(learn, wd):
        with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, wd=wd)
    learn = make(tmp_path); learn.add_cb(Die('after_pred', 7))
    with pytest.raises(KeyboardInterrupt): decayed(learn, .1)
    learn = make(tmp_path); learn.resume()
    with pytest.raises(ValueError, match=r'hypers\[0\].wd: 0.1 → 0.5'): decayed(learn, .5)
    learn = make(tmp_path); learn.resume(['hypers']); decayed(learn, .5)
    assert learn.opt.hypers[0]['wd']==.5 and max(s['step'] for s in learn.opt.state.values() if 'step' in s)==15

def test_more_epochs(tmp_path):
    "A longer run than was planned goes on at its own place in the schedule"
    learn = make(tmp_path/'short'); learn.add_cb(Die('after_pred', 9))
    with pytest.raises(KeyboardInterrupt): fit(learn, 2)
    whole = make(tmp_path/'long'); fit(whole, 4)
    learn = make(tmp_path/'short'); learn.resume(['n_epoch','param_scheduler.lr','param_scheduler.mom']); fit(learn, 4)
    assert learn.recorder.lrs[6:]==pytest.approx(whole.recorder.lrs[6:])

def test_wrong_use(tmp_path):
    for kwargs,msg in ((dict(minutes=0), 'minutes=0 must be positive'), (dict(steps=-1), 'steps=-1'), (dict(keep=0), 'keep=0')):
        with pytest.raises(ValueError, match=msg): Checkpoint(tmp_path, **kwargs)
    learn = make(tmp_path); fit(learn)
    with pytest.raises(ValueError, match='holds the checkpoints of a run already.*resume'): fit(make(tmp_path))
    with pytest.raises(ValueError, match=r'override=.*typo.*no such settings, only.*swav.K'): other = make(tmp_path); other.resume(['typo']); fit(other)
    bigger = make(tmp_path)
    bigger.model = methods.model('swav', enc=encoder(), n_protos=20)
    with pytest.raises(ValueError, match='another model.*prototypes.weight: 10×8 → 20×8'): bigger.resume()
    learn.remove_cb(learn.checkpoint)
    with pytest.raises(ValueError, match='no Checkpoint callback'): learn.resume()

def test_export_of_a_learner(tmp_path):
    learn = make(tmp_path); fit(learn)
    learn.export(tmp_path/'learner.pkl')


# Files

def test_damage(tmp_path):
    "Cut anywhere, one bit changed anywhere: named, and the one before is used"
    learn = make(tmp_path); fit(learn)
    old,new = learn.checkpoint.files
    good,rng = new.read_bytes(),random.Random(0)
    want = read_checked(old)['train_iter']
    for i in range(40):
        n = rng.randrange(len(good))
        new.write_bytes(good[:n] if i%2 else good[:n]+bytes([good[n]^(1<<rng.randrange(8))])+good[n+1:])
        with pytest.raises(ValueError, match=new.name+' is damaged'): read_checked(new)
    again = make(tmp_path)
    with pytest.warns(UserWarning, match=new.name+' is damaged'): assert again.resume()==old
    assert again.checkpoint._saved['train_iter']==want
    old.write_bytes(b'')
    before = {k:v.clone() for k,v in again.model.state_dict().items()}
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='no checkpoint in .* is whole'): again.resume()
    assert same(before, dict(again.model.state_dict())) # nothing is loaded half

def test_writing_fails(tmp_path, monkeypatch):
    "The disk is full, or the process dies: the old file is there"
    f = tmp_path/'x'
    write_atomic({'a':1}, f)
    for nm in ('fsync','replace'):
        with monkeypatch.context() as m:
            m.setattr(os, nm, lambda *args: (_ for _ in ()).throw(OSError('full')))
            with pytest.raises(OSError): write_atomic({'a':2}, f)
        assert read_checked(f)=={'a':1}

class Held:
    "A disk that is slow: `write_atomic` waits until `go`"
    def __init__(self, monkeypatch):
        self.began,self.go,self.n,self.at_once = threading.Event(),threading.Event(),0,0
        monkeypatch.setattr(checkpoint, 'write_atomic', self.write)
    def write(self, *args):
        self.n += 1
        self.at_once = max(self.at_once, self.n)
        self.began.set()
        assert self.go.wait(30)
        write_atomic(*args)
        self.n -= 1

def in_step(n, *fs):
    "Calls, once step `n` has changed the weights"
    class In(Watcher):
        def after_step(self):
            if self.train_iter==n-1: [f() for f in fs]
    return In

def test_training_goes_on_while_a_file_is_written(tmp_path, monkeypatch):
    "Three steps and a validation change everything in place; in the file is what was when it was saved"
    def content(f): return {k:{n:{a:b for a,b in o.items() if a!='start_epoch'} for n,o in v.items()} if k=='cbs' else v for k,v in read_checked(f).items()}
    fit(make(tmp_path/'fast', steps=4, keep=9, cbs=[in_step(8)]))
    held = Held(monkeypatch)
    fit(make(tmp_path/'slow', steps=4, keep=9, cbs=[in_step(8, held.began.wait, held.go.set)]))
    a,b = (sorted((tmp_path/o).glob('*.ckpt')) for o in ('fast','slow'))
    assert [o.name for o in a]==[o.name for o in b] and len(a)==4 and held.at_once==1
    for x,y in zip(a, b): assert same(content(x), content(y)), x

def test_validation_changes_nothing_that_is_saved(tmp_path):
    "What is saved after the first batch of validation, when a signal came, is what was before it"
    class Sums(Watcher):
        def __init__(self): self.sum = torch.zeros(1)
        def after_batch(self):
            self.sum += 1
            if not self.training: self.learn.checkpoint.stopped = 'SIGTERM'
    fit(learn := make(tmp_path, steps=None, cbs=[Sums]))
    assert learn.sums.sum==6 and learn.checkpoint.newest()[1]['cbs']['sums']['sum']==5

@pytest.mark.parametrize('ends', ['end','error','ask'])
def test_everybody_waits_for_the_file(tmp_path, monkeypatch, ends):
    "The end of a fit, and whoever asks for the files, also after an error"
    held,seen = Held(monkeypatch),[]
    learn = make(tmp_path, steps=4, cbs=[in_step(5, held.began.wait, threading.Timer(.3, held.go.set).start, *([lambda: seen.append(Checkpoint(tmp_path).newest())] if ends=='ask' else []))])
    if ends!='end': learn.add_cb(Die('after_step', 5))
    with pytest.raises(KeyboardInterrupt) if ends!='end' else nullcontext(): fit_alone(learn, 1)
    assert [int(o.stem[-9:]) for o in (sorted(tmp_path.glob('*.ckpt')) if ends=='end' else Checkpoint(tmp_path).files)]==[4,5][:1+(ends=='end')]
    assert not checkpoint._writing and (ends!='ask' or seen[0][1]['train_iter']==4)

@pytest.mark.parametrize('bad', [2,5])
def test_a_full_disk_is_said(tmp_path, monkeypatch, bad):
    "By the next save, or the end of the fit; the file before is there; and it is said once"
    def full(state, path):
        if int(path.stem[-9:])==bad: raise OSError(28, 'No space left on device', str(path))
        write_atomic(state, path)
    monkeypatch.setattr(checkpoint, 'write_atomic', full)
    learn = make(tmp_path, steps=1 if bad==2 else 4)
    with pytest.raises(OSError, match='No space left on device.*fit01-step00000000'): fit(learn, 1)
    assert learn.checkpoint.last_saved.name==f'fit01-step00000000{bad-1}.ckpt' and len(learn.recorder.losses)==min(bad+1, 5)
    assert signal.getsignal(signal.SIGTERM)==signal.SIG_DFL or bad==2

def _leaves(folder):
    "A process that fails in the middle of writing, and looks at no file"
    write = checkpoint.write_atomic
    checkpoint.write_atomic = lambda *args: (time.sleep(.5), write(*args))
    learn = make(Path(folder), steps=4)
    learn.add_cb(Die('after_step', 5))
    fit_alone(learn)

def test_the_end_of_python_waits(tmp_path):
    r = processes.run(_leaves, str(tmp_path), timeout=60)
    assert r.returncode and 'KeyboardInterrupt' in r.stderr
    f, = tmp_path.glob('*.ckpt')
    assert read_checked(f)['train_iter']==4 and not list(tmp_path.glob('*.part'))

def test_host_copy(monkeypatch):
    "Of a GPU, which is pretended here: pinned, without waiting for each, one wait at the end; layout and sharing stay"
    class Card(torch.Tensor): is_cuda = True
    pinned,waits,copies,empty,copy_ = [],[],[],torch.empty_like,torch.Tensor.copy_
    monkeypatch.setattr(torch, 'empty_like', lambda t, device, pin_memory: pinned.append(pin_memory) or empty(t.as_subclass(torch.Tensor), device=device))
    monkeypatch.setattr(torch.Tensor, 'copy_', lambda a, b, non_blocking=False: copies.append(non_blocking) or copy_(a, b.as_subclass(torch.Tensor), non_blocking))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda d: waits.append(d) or SimpleNamespace(synchronize=lambda: waits.append('wait')))
    w,v = torch.rand(2,3,4,5).to(memory_format=torch.channels_last),torch.rand(3)
    on_card = w.as_subclass(Card)
    state = {'a':on_card, 'b':[on_card, v, None], 'c':({'d':v[1:]}, 'x', 2)}
    got = host_copy(state)
    assert pinned==[True,False,False] and all(copies) and waits==[torch.device('cpu'),'wait']
    assert got['a'] is got['b'][0] and torch.equal(got['a'], w) and got['a'].stride()==w.stride() and type(got['a']) is torch.Tensor
    m = nn.BatchNorm2d(2)
    assert host_copy(m.state_dict())._metadata==m.state_dict()._metadata # versions of layers
    want = v.clone(); v.zero_()
    assert torch.equal(got['b'][1], want) and torch.equal(got['c'][0]['d'], want[1:]) and got['c'][1:]==('x',2) and got['b'][2] is None

class Evil:
    def __reduce__(self): return os.system, ('echo evil > /dev/null',)

def test_no_code_from_files(tmp_path):
    "A file with a right sum that asks for a function to be called"
    write_atomic({'a':Evil()}, tmp_path/'x')
    with pytest.raises(Exception, match='(?i)weights.?only|unsupported') as e: read_checked(tmp_path/'x')
    assert 'system' in str(e.value)


# Processes that are killed

class Kill(Watcher):
    "Send this process a signal in the `nth` call of `event`; 'write' is the middle of writing a checkpoint, 'rename' just before it gets its name"
    order = 99
    def __init__(self, event, nth, sig='SIGKILL'): self.event,self.nth,self.sig = event,nth,sig
    def count(self):
        self.nth -= 1
        if self.nth==0: os.kill(os.getpid(), getattr(signal, self.sig))
    def __call__(self, event):
        super().__call__(event)
        if event==self.event: self.count()
    def before_fit(self):
        super().before_fit()
        write,replace = state._Summed.write,os.replace
        def _write(o, b):
            n = write(o, b)
            o.f.flush()
            if len(b)>500: self.count()
            return n
        def _replace(a, b):
            if Path(a).suffix=='.part': self.count()
            replace(a, b)
        if self.event=='write':  state._Summed.write = _write
        if self.event=='rename': os.replace = _replace

def _job(r, n, folder, moment, victim, attempt):
    "One process of a run that is started over and over"
    torch.set_num_threads(1)
    folder = Path(folder)
    os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR='localhost', MASTER_PORT='0')
    if n==1: [os.environ.pop(o) for o in ('RANK','LOCAL_RANK','WORLD_SIZE')]
    else: tdist.init_process_group('gloo', init_method=f'file://{folder}/meet{attempt}', rank=r, world_size=n)
    started = any((folder/'run').glob('*.ckpt'))
    learn = make(folder/'run', seed=42+100*attempt*started)
    learn.resume(missing_ok=True)
    if moment and r==victim: learn.add_cb(Kill(*moment))
    if r==0: (folder/'ready').touch()
    if n==1: fit(learn)
    else:
        with learn.distrib_ctx(in_notebook=False): fit(learn)
    if learn.checkpoint.stopped: (folder/f'stopped{r}').write_text(learn.checkpoint.stopped)
    elif r==0: torch.save(outcome(learn), folder/'done.pt')
    if n>1 and tdist.is_initialized(): tdist.destroy_process_group()

def start(n, folder, moment=None, victim=0, attempt=0): return [processes.start(_job, r, n, str(folder), moment, victim, attempt) for r in range(n)]

def wait(ps, until=lambda: False, seconds=120):
    "Wait for all; when one dies, or it is time, the others are killed too, as a scheduler does"
    end = time.monotonic()+seconds
    while None in (codes := [p.poll() for p in ps]) and not any(codes) and not until() and time.monotonic()<end: time.sleep(.005)
    for p in ps: p.end()
    return [p.returncode for p in ps]

def until_ready(ps, folder):
    "Wait until the first process is about to fit"
    while not (folder/'ready').exists(): assert not any(p.poll() for p in ps), [p.err() for p in ps]; time.sleep(.005)

@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    "What a run of `n` processes gives, and how long it takes after it is ready"
    res = {}
    def _get(n):
        if n not in res:
            folder = tmp_path_factory.mktemp(f'whole{n}')
            ps = start(n, folder)
            until_ready(ps, folder)
            t = time.monotonic()
            assert wait(ps)==[0]*n
            res[n] = torch.load(folder/'done.pt', weights_only=False),time.monotonic()-t
        return res[n]
    return _get

def kill_and_go_on(n, folder, want, moment=None, victim=0, after=None):
    ps = start(n, folder, moment, victim)
    if after is None: codes = wait(ps)
    else:
        until_ready(ps, folder)
        t = time.monotonic()+after
        codes = wait(ps, lambda: time.monotonic()>t)
    assert after is not None or codes[victim]==-signal.SIGKILL, codes
    for attempt in (1, 2):
        if (folder/'done.pt').exists(): break
        assert wait(start(n, folder, attempt=attempt))==[0]*n
    assert same(want, torch.load(folder/'done.pt', weights_only=False))

moments = [('after_pred', 2), ('after_step', 8), ('before_validate', 2), ('write', 3), ('rename', 2), ('after_epoch', 2)]

@pytest.mark.slow
@pytest.mark.parametrize('moment', moments)
def test_killed(tmp_path, uninterrupted, moment): kill_and_go_on(1, tmp_path, uninterrupted(1)[0], moment)

@pytest.mark.slow
@pytest.mark.parametrize('moment,victim', [(('after_backward', 4), 1), (('write', 2), 0), (('before_validate', 2), 0)])
def test_killed_2_ranks(tmp_path, uninterrupted, moment, victim): kill_and_go_on(2, tmp_path, uninterrupted(2)[0], moment, victim)

def random_moment(seed, n):
    "Half of them a time, half of them an event; `n` processes have a part of the batches each"
    rng = random.Random(seed)
    if seed%2: return dict(after=rng.random())
    events = dict(before_batch=18//n, after_pred=18//n, after_backward=15//n-1, after_step=15//n-1, after_batch=18//n, before_validate=3, after_validate=3, after_epoch=3, write=20, rename=3)
    event = rng.choice(list(events))
    return dict(moment=(event, rng.randint(1, events[event])), victim=0 if event in ('write','rename') else rng.randrange(n)) # the first process writes

@pytest.mark.kill
@pytest.mark.parametrize('n', [1, 2])
@pytest.mark.parametrize('seed', range(20))
def test_killed_at_random(tmp_path, uninterrupted, n, seed):
    want,seconds = uninterrupted(n)
    m = random_moment(seed, n)
    if 'after' in m: m['after'] *= seconds
    kill_and_go_on(n, tmp_path, want, **m)

@pytest.fixture(autouse=True)
def signals():
    "The handlers of before, whatever a test leaves"
    old = {o:signal.getsignal(o) for o in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for o,h in old.items(): signal.signal(o, h)

def test_signal_after_an_error(tmp_path):
    "A fit that ended in an error does not keep the signals"
    got = []
    signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
    learn = make(tmp_path); learn.add_cb(Die('after_pred', 2))
    with pytest.raises(KeyboardInterrupt): fit(learn)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert got==[1] and learn.checkpoint.stopped is None

@pytest.mark.slow
@pytest.mark.parametrize('n,sig,where', [(1,'SIGTERM','after_pred'), (1,'SIGUSR1','before_validate'), (2,'SIGTERM','after_pred'), (2,'SIGUSR1','before_validate')])
def test_signals(tmp_path, uninterrupted, n, sig, where):
    "Save, end the fit well, and say so; with two processes it is enough that one of them is told"
    assert wait(start(n, tmp_path, (where, 7 if where=='after_pred' else 2, sig), n-1))==[0]*n
    assert {(tmp_path/f'stopped{r}').read_text() for r in range(n)}<={sig, 'a signal to another process'} and not (tmp_path/'done.pt').exists()
    steps = {1:{'after_pred':5, 'before_validate':10}, 2:{'after_pred':4, 'before_validate':4}}[n][where] # the 7th forward pass is in the second epoch, one of each is validation
    assert int(max((tmp_path/'run').glob('*.ckpt')).stem[-9:])>=steps
    assert wait(start(n, tmp_path, attempt=1))==[0]*n
    assert same(uninterrupted(n)[0], torch.load(tmp_path/'done.pt', weights_only=False))

def test_second_signal(tmp_path):
    "The first is answered at the end of the step, the second at once; after the fit everything is as it was"
    before,learn = signal.getsignal(signal.SIGTERM),make(tmp_path)
    class Twice(Watcher):
        def after_pred(self):
            if self.training: os.kill(os.getpid(), signal.SIGUSR1)
            assert signal.getsignal(signal.SIGTERM)==before
    learn.add_cb(Twice()); fit(learn)
    assert learn.checkpoint.stopped=='SIGUSR1' and learn.checkpoint.files and signal.getsignal(signal.SIGTERM)==before
    assert len(learn.recorder.losses)==1
    assert len(learn.validate())==1 # is no fit to be stopped

def test_no_fit_after_a_signal(tmp_path, capsys):
    "The next fit of the script does not start; in a new process, and after `resume`, all goes on; `validate` is no fit"
    class Once(Watcher):
        def after_pred(self):
            if self.training and self.train_iter==2: os.kill(os.getpid(), signal.SIGUSR1)
    def script(learn): fit(learn, 1); fit(learn, 2)
    whole = make(tmp_path/'whole'); script(whole)
    learn = make(tmp_path/'run', cbs=[Once]); fit(learn, 1)
    weights,saved = deepcopy(learn.model.state_dict()),learn.checkpoint.files
    fit(learn, 2)
    assert same(weights, learn.model.state_dict()) and learn.checkpoint.files==saved and learn.checkpoint.stopped=='SIGUSR1'
    assert 'This fit does not start: SIGUSR1 has stopped the one before' in capsys.readouterr().out
    assert len(learn.validate())==1
    assert same(outcome(whole), outcome(go_on(tmp_path/'run', script)))
    learn.remove_cb(Once); learn.resume(); script(learn)
    assert same(dict(whole.model.state_dict()), dict(learn.model.state_dict())) and learn.checkpoint.stopped is None

def test_a_learner_whose_checkpoint_is_gone_is_free_again(tmp_path):
    class Once(Watcher):
        def after_pred(self):
            if self.training and self.train_iter==2: os.kill(os.getpid(), signal.SIGUSR1)
    learn = make(tmp_path, cbs=[Once]); fit(learn, 1)
    learn.remove_cbs([learn.checkpoint, learn.once]); fit(learn, 1)
    assert len(learn.recorder.losses)==5

def _first_decides(folder):
    "Of two processes the second does not see the newest file, or none; or the first sees none"
    res = []
    for hide in ('newest', 'all', 'first'):
        learn,found = make(folder/'run', seed=5, steps=None),sorted((folder/'run').glob('*.ckpt'))
        shown = {('newest',1):found[:-1], ('all',1):[], ('first',0):[]}.get((hide,tdist.get_rank()), found)
        class Seeing(Checkpoint):
            @property
            def files(self): return L(shown)
            def save(self): "Nothing: the folder stays as it is"
        learn.remove_cb(learn.checkpoint); learn.add_cb(Seeing(folder/'run', minutes=None))
        learn.resume(missing_ok=True)
        try:
            with learn.distrib_ctx(in_notebook=False): fit(learn)
            res.append((len(learn.recorder.losses), learn.model.encoder[0].weight.detach().clone(), learn.model.queue.feats.clone()))
        except ValueError as e: res.append(str(e))
    return res

@pytest.mark.slow
def test_first_process_decides(tmp_path):
    "They all go on with what the first process sees, or nobody does"
    assert wait(start(2, tmp_path))==[0,0]
    assert len(list((tmp_path/'run').glob('*.ckpt')))==2
    a,b = processes.on_ranks(_first_decides, tmp_path, 2)
    assert a[2]==b[2] and 'process 1 cannot go on' in a[2] and 'the first one sees none' in a[2]
    for x,y in zip(a[:2], b[:2]): assert same(x, y) and x[0]==6 and same(x, a[0])

def test_weights_of_a_callback(tmp_path):
    "What others do to the weights when a fit begins is undone"
    class Shrink(Watcher):
        def before_fit(self):
            super().before_fit()
            with torch.no_grad(): self.model.encoder[0].weight.mul_(.5)
    check(tmp_path, cbs=[Shrink])


# Encoders

class Own(nn.Module):
    "An encoder that nobody else knows"
    def __init__(self, width=8):
        super().__init__()
        self.body,self.pool = nn.Sequential(nn.Conv2d(3,width,3), nn.BatchNorm2d(width), nn.ReLU()),nn.AdaptiveAvgPool2d(1)
    def forward(self, x): return self.pool(self.body(x)).flatten(1)

def exported(tmp_path, enc, name='swav', stats=([.5]*3,[.25]*3)):
    "The file of an encoder whose numbers are all different from those of a new one"
    with torch.no_grad():
        for o in enc.state_dict().values(): o.copy_(.1*torch.rand(o.shape) if o.is_floating_point() else 7)
    learn = Learner(tensor_dls(images(c=3), bs=8), methods.model(name, enc=enc, n_features=4), cbs=callback(name, augs(name, stats=stats)))
    return learn.export_encoder(tmp_path/'encoder.safetensors')

def kinds(a): return [(k,v.dtype,v.shape) for k,v in a.state_dict().items()]
def equal(a, b): return all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values()))

@pytest.fixture(scope='module')
def resnet18_file(tmp_path_factory): return exported(tmp_path_factory.mktemp('resnet18'), create_encoder('resnet18', pretrained=False))

archs = [('resnet18', {}), ('xresnet18', {}), ('resnet18', dict(low_resolution=True)), ('squeezenet1_1', {}), ('test_mambaout', {}), ('vit_tiny_patch16_224', dict(pool_type='avg')), ('convnext_atto', {})]

@pytest.mark.parametrize('arch,kwargs,name', [(*o,'swav') for o in archs] + [(*archs[1],nm) for nm in methods.methods if nm!='swav'])
def test_round_trip(tmp_path, arch, kwargs, name):
    "A new encoder, built by what the header says, is equal to the bit"
    enc   = create_encoder(arch, pretrained=False, **kwargs)
    again = load_encoder(exported(tmp_path, enc, name))
    assert kinds(again)==kinds(enc) and equal(again, enc) and str(again)==str(enc)
    x = torch.rand(2,3,64,64)
    with torch.no_grad(): assert torch.equal(again.eval()(x), enc.eval()(x)) and enc(x).isfinite().all()

def test_timm_and_torchvision_of_one_name(tmp_path):
    again = load_encoder(exported(tmp_path, create_timm_encoder('resnet18', pretrained=False)))
    assert type(again)==timm.models.ResNet

def test_half(tmp_path):
    enc   = create_encoder('resnet18', pretrained=False).half()
    again = load_encoder(exported(tmp_path, enc))
    assert kinds(again)==kinds(enc) and equal(again, enc)

def test_checkpointed(tmp_path):
    "Gradient checkpointing is no part of the encoder"
    for arch in ('resnet18','vit_tiny_patch16_224'):
        enc = checkpoint_encoder(create_encoder(arch, pretrained=False, pool_type=None))
        assert equal(load_encoder(exported(tmp_path, enc)), enc)

def test_wrappers(tmp_path):
    "Names are those of the encoder, whatever is wrapped around it or a part of it"
    names = list(Own().state_dict())
    compiled,inner,synced = torch.compile(Own()),Own(),nn.SyncBatchNorm.convert_sync_batchnorm(Own())
    inner.body = torch.compile(inner.body)
    both = torch.compile(Own())
    both._orig_mod.body = torch.compile(both._orig_mod.body)
    for enc in (compiled, inner, both, synced):
        f = exported(tmp_path, enc)
        assert encoder_info(f)['order']==names
        assert equal(load_encoder(f, Own()), enc)
        assert equal(load_encoder(f, enc), enc)

def _ddp(folder):
    os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='localhost', MASTER_PORT='0')
    tdist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=0, world_size=1)
    enc = nn.parallel.DistributedDataParallel(Own())
    f   = exported(Path(folder), enc)
    assert encoder_info(f)['order']==list(Own().state_dict()) and equal(load_encoder(f, Own()), enc)
    tdist.destroy_process_group()

@pytest.mark.slow
def test_ddp(tmp_path):
    r = processes.run(_ddp, str(tmp_path), timeout=120)
    assert r.returncode==0, r.stderr

@pytest.mark.parametrize('lib', [torchvision.models.resnet18, partial(timm.create_model, 'resnet18')])
@pytest.mark.parametrize('create', ['resnet18', 'timm'])
def test_into_plain_models(tmp_path, lib, create):
    "With the classifier they have, which keeps its weights, and without"
    enc   = create_timm_encoder('resnet18', pretrained=False) if create=='timm' else create_encoder('resnet18', pretrained=False)
    f     = exported(tmp_path, enc)
    plain = lib()
    head  = plain.fc.weight.clone()
    assert load_encoder(f, plain) is plain and torch.equal(plain.fc.weight, head)
    body  = [v for k,v in plain.state_dict().items() if not k.startswith('fc')]
    assert len(body)==len(enc.state_dict()) and all(torch.equal(a, b) for a,b in zip(body, enc.state_dict().values()))
    plain = lib(); plain.fc = nn.Identity()
    assert equal(load_encoder(f, plain), enc)

def test_plain_file_of_safetensors(tmp_path):
    "Of another library: no header, so names have to agree"
    from safetensors.torch import save_file
    enc = Own(); save_file(enc.state_dict(), tmp_path/'x')
    assert encoder_info(tmp_path/'x')=={} and equal(load_encoder(tmp_path/'x', Own()), enc)

@pytest.mark.parametrize('into,msg', [
    (lambda: timm.create_model('resnet34'), r"layer1.2.conv1.weight"), (lambda: timm.create_model('resnet50'), r"layer1.0.conv1.weight \(64, 64, 1, 1\) in the model"),
    (lambda: create_encoder('resnet18', pretrained=False, n_in=1), r'0.weight \(64, 3, 7, 7\) in the file, 0.weight \(64, 1, 7, 7\) in the model'),
    (lambda: nn.Sequential(*create_encoder('resnet18', pretrained=False)[:6]), 'has no counterpart in the model'),
    (lambda: nn.Sequential(create_encoder('resnet18', pretrained=False), nn.Linear(1024,512), nn.BatchNorm1d(512)), 'has no counterpart in the file'),
    (lambda: nn.Sequential(create_encoder('resnet18', pretrained=False), nn.Linear(1024,512), nn.Linear(512,10)), 'has no counterpart in the file'),
    (lambda: nn.Sequential(create_encoder('resnet18', pretrained=False), nn.Unflatten(1, (1024,1,1)), nn.Conv2d(1024,10,1)), 'has no counterpart in the file'),
    (Own, r'0.weight \(64, 3, 7, 7\) in the file, body.0.weight \(8, 3, 3, 3\) in the model')])
def test_another_architecture(resnet18_file, into, msg):
    "Nothing is loaded, and the first difference is named"
    f,m = resnet18_file,into()
    before = {k:v.clone() for k,v in m.state_dict().items()}
    with pytest.raises(ValueError, match=r'(?s)encoder.safetensors \(resnet18\) does not fit.*'+msg): load_encoder(f, m)
    assert same(before, dict(m.state_dict()))

def test_header(tmp_path):
    info = encoder_info(exported(tmp_path, create_encoder('xresnet18', pretrained=False, n_in=3, low_resolution=True), 'simclr'))
    assert (info['architecture'], info['method'], info['input_size'], info['normalization'])==('xresnet18', 'sim_clr', [12,12], {'mean':[.5]*3, 'std':[.25]*3})
    assert info['create_encoder']['low_resolution'] is True and len(info['commit'])==40 or info['commit']=='unknown'
    info = encoder_info(exported(tmp_path, Own(), stats=None))
    assert info['architecture']=='Own' and info['normalization'] is None and info['create_encoder'] is None

def test_wrong_files(tmp_path):
    with pytest.raises(ValueError, match='holds a Own, which create_encoder does not know.*pass it as `encoder`'): load_encoder(exported(tmp_path, Own()))
    with pytest.raises(ValueError, match='Sequential.*has no `encoder`'): Learner(tensor_dls(images(), bs=8), nn.Sequential(nn.Linear(1,1))).export_encoder(tmp_path/'x')
