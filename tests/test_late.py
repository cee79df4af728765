"The losses of a GPU are noted when they have come, and are what they would have been"
import random
from types import SimpleNamespace as NS

import pytest, torch
from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find into Learner)
from fastai.data import load
from fastai.torch_core import set_seed
from torch import Tensor

from methods import images, learner, loaders, quiet
from self_supervised import dist, loaders as our_loaders
from self_supervised.checkpoint import Checkpoint
from self_supervised.state import state_of

class Slow:
    "A copy that takes its time"
    seen,rng = [],random.Random(0)
    def __init__(self, t): self.t = t.clone()
    def has_come(self): return self.rng.random()<.2
    def get(self): return self.t

class Lag(Callback):
    "How many losses are late, when others look"
    order = 70
    def before_fit(self): self.late = []
    def after_batch(self):
        if not self.training: return
        self.late.append(len(self.recorder.lrs)-len(self.recorder.losses))
        assert torch.equal(self.learn.smooth_loss, self.recorder.losses[-1])

def gpu(monkeypatch):
    "A GPU that is not there"
    monkeypatch.setattr(dist, '_OnItsWay', Slow)
    monkeypatch.setattr(dist, '_can_be_late', lambda rec: rec.training and not rec.train_metrics and not any(isinstance(o, LRFinder) for o in rec.learn.cbs))

def fit(epochs=3, cbs=(), run=quiet, **kwargs):
    set_seed(0)
    learn = learner('simclr', dls=loaders('simclr', images(56), images(12), seed=0), cbs=[Lag(), *cbs], **kwargs)
    run(learn, epochs)
    return learn

def noted(learn): return torch.stack(list(learn.recorder.losses)),learn.recorder.lrs,[list(o) for o in learn.recorder.values],learn.recorder.iters,float(learn.smooth_loss),learn.recorder.smooth_loss.count
def same(a, b): return torch.equal(a[0], b[0]) and a[1:]==b[1:]

def test_all_that_is_noted(monkeypatch):
    want = fit()
    assert set(want.lag.late)=={0}
    gpu(monkeypatch)
    got = fit()
    assert same(noted(want), noted(got)) and max(got.lag.late)==4 and got.lag.late[0]==0 and len(set(got.lag.late))>2
    got.recorder.plot_loss()
    quiet(got, 1)
    assert len(got.recorder.losses)==len(got.recorder.lrs)==7

class Stop(Callback):
    def __init__(self, what): self.what = what
    def before_step(self):
        if self.train_iter==4 and self.epoch==0: raise self.what('enough')

@pytest.mark.parametrize('stop', [CancelFitException, CancelTrainException])
def test_a_fit_that_ends_early(stop, monkeypatch):
    want = noted(fit(2, [Stop(stop)]))
    gpu(monkeypatch)
    assert same(want, noted(fit(2, [Stop(stop)])))

def test_a_fit_that_breaks_off(monkeypatch):
    "Has noted what had come, and the next one begins anew"
    def run(learn, n):
        with pytest.raises(ZeroDivisionError): quiet(learn, n)
    def again(learn, n):
        run(learn, n)
        learn.remove_cb(Stop)
        quiet(learn, n)
    want,then = noted(fit(2, [Stop(ZeroDivisionError)], run)),noted(fit(2, [Stop(ZeroDivisionError)], again))
    gpu(monkeypatch)
    got = noted(fit(2, [Stop(ZeroDivisionError)], run))
    assert len(got[0])>=1 and torch.equal(got[0], want[0][:len(got[0])])
    assert same(then, noted(fit(2, [Stop(ZeroDivisionError)], again)))

def test_lr_find_sees_every_loss(monkeypatch):
    def run(learn, _):
        with learn.no_bar(): learn.found = learn.lr_find(num_it=12, show_plot=False)
    want = fit(run=run)
    gpu(monkeypatch)
    got = fit(run=run)
    assert got.found==want.found and set(got.lag.late)=={0}

def test_who_may_be_late():
    "The losses of a GPU in training, if nobody needs them at once"
    def late(training=True, cuda=True, metrics=False, cbs=()):
        return dist._can_be_late(NS(training=training, train_metrics=metrics, learn=NS(loss=NS(is_cuda=cuda), cbs=cbs)))
    assert late() and not (late(training=False) or late(cuda=False) or late(metrics=True) or late(cbs=[LRFinder()]))

def test_training_metrics_see_every_loss(monkeypatch):
    def run(learn, n):
        learn.recorder.train_metrics = True
        quiet(learn, n)
    want = noted(fit(run=run))
    gpu(monkeypatch)
    assert same(want, noted(fit(run=run)))

def test_progress_bar(monkeypatch):
    "Shows what has come, and reads nothing else"
    shown = []
    class Show(Callback):
        order = ProgressCallback.order+1
        def after_batch(self):
            if self.training: shown.append((self.progress.pbar.comment, f'{float(self.recorder.losses[-1]):.4f}'))
    gpu(monkeypatch)
    fit(1, [Show()], lambda learn, n: learn.fit(n))
    assert len(shown)==7 and all(a==b for a,b in shown)

class Half(Exception): pass

def test_checkpoint_and_resume(monkeypatch, tmp_path):
    "Losses that were late are in the file"
    def stop(cb):
        if cb.epoch==1 and cb.train_iter==12: raise Half('enough')
    def run(learn, n):
        with pytest.raises(Half): quiet(learn, n, cbs=Callback(before_step=stop))
    want = noted(fit())
    gpu(monkeypatch)
    fit(run=run, cbs=[Checkpoint(tmp_path/'ckpt', minutes=None, steps=5)], path=tmp_path)
    def on(learn, n):
        learn.resume(override='callback.before_step')
        quiet(learn, n)
    got = fit(run=on, cbs=[Checkpoint(tmp_path/'ckpt', minutes=None, steps=5)], path=tmp_path)
    assert same(noted(got), want)

def test_state_has_what_was_late(monkeypatch):
    gpu(monkeypatch)
    class Look(Callback):
        order = 80
        def after_batch(self):
            if self.training and self.train_iter==6: self.before,self.state = len(self.recorder.losses),state_of(self.recorder)
    learn = fit(1, [Look()])
    assert learn.look.before<6==len(learn.look.state['losses']['stacked']) and learn.look.state['_coming']==[]

class Spy(Tensor):
    def to(self, *args, **kwargs): return args,kwargs

def test_copies_to_a_gpu_do_not_wait():
    x = torch.zeros(2).as_subclass(Spy)
    for f in (load.to_device, our_loaders.to_device):
        assert f([x], torch.device('cuda'))==[((torch.device('cuda'),), dict(non_blocking=True))] and f((x,), 'cuda:1')[0][1]==dict(non_blocking=True)
        assert f(x, 'cpu')==(('cpu',), dict(non_blocking=False)) and f(x, torch.device('cpu'))[1]==f(x)[1]==dict(non_blocking=False) # whoever reads the copy has not waited
        assert f(x, 'cpu', non_blocking=True)[1]==dict(non_blocking=True)
