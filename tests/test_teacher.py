"The moving average: against its closed form, and when it moves"
import copy, math

import pytest, torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find into Learner)
from fastai.callback.training import GradientAccumulation
from timm.layers import DropPath
from torch import nn

from methods import augs, callback, encoder, images, learner, loaders, quiet
from self_supervised.diagnostics import CollapseMonitor
from self_supervised.layers import create_mlp_module
from self_supervised.multicrop import multicrop
from self_supervised.teacher import EMATeacher
from self_supervised.vision.byol import BYOL

class Student(nn.Module):
    def __init__(self, enc=None):
        super().__init__()
        self.encoder,self.projector = encoder() if enc is None else enc,create_mlp_module(8, 16, 4, bn=True)
        self.teacher = EMATeacher(self.encoder, self.projector)

def tensors(o): return [*o.encoder.state_dict().values(), *o.projector.state_dict().values()]

def test_closed_form():
    "After n moves it is mⁿ·t₀ + (1−m)·Σ mⁿ⁻¹⁻ⁱ·sᵢ, whose buffers are those of the last"
    torch.manual_seed(0); m = Student().double()
    names = [k for o in (m.encoder,m.projector) for k,_ in o.named_parameters()]
    start,past = [p.clone() for p in [*m.teacher.encoder.parameters(), *m.teacher.projector.parameters()]],[]
    for i in range(7):
        for p in m.parameters():
            if p.requires_grad: p.data.add_(torch.randn_like(p))
        m.encoder(torch.rand(4,1,9,9).double()) # moves the running statistics
        m.teacher.update(m, .8)
        past.append([p.detach().clone() for p in [*m.encoder.parameters(), *m.projector.parameters()]])
    want = [.8**7*t + sum(.2*.8**(6-i)*s for i,s in enumerate(ss)) for t,*ss in zip(start, *past)]
    for k,t,w in zip(names, [*m.teacher.encoder.parameters(), *m.teacher.projector.parameters()], want): torch.testing.assert_close(t.detach(), w, rtol=0, atol=1e-12, msg=k)
    for t,s in zip([*m.teacher.encoder.buffers(), *m.teacher.projector.buffers()], [*m.encoder.buffers(), *m.projector.buffers()], strict=True): assert torch.equal(t, s)
    assert m.teacher.updates==7

def test_one_copy_and_one_operation(monkeypatch):
    "Memory for one set of weights, which move together"
    m,n = Student(),[]
    count = lambda *os: sum(p.numel() for o in os for p in (*o.parameters(), *o.buffers()))
    assert count(m.teacher)==count(m.encoder, m.projector)+1 # and the number of moves
    foreach = torch._foreach_lerp_
    monkeypatch.setattr(torch, '_foreach_lerp_', lambda *args: (n.append(len(args[0])), foreach(*args)))
    m.teacher.update(m, .9)
    assert n==[len([*m.encoder.parameters(), *m.projector.parameters()])]

def test_never_trained():
    m = Student()
    assert not any(p.requires_grad for p in m.teacher.parameters()) and all(p.requires_grad for p in [*m.encoder.parameters(), *m.projector.parameters()])
    assert not m.teacher([torch.rand(2,1,9,9, requires_grad=True)]).requires_grad

def test_no_luck_in_targets():
    "Dropout and stochastic depth stay off when the rest trains, in copies too"
    class Block(nn.Module):
        def __init__(self): super().__init__(); self.drop = DropPath(.9)
        def forward(self, x): return x+self.drop(x)
    m = Student(nn.Sequential(encoder(), Block(), nn.Dropout(.9)))
    x = [torch.rand(64,1,9,9)]
    for o in (m.train(), copy.deepcopy(m)):
        assert torch.equal(o.teacher(x), o.teacher(x)) and not torch.equal(o.encoder(x[0]), o.encoder(x[0]))
        assert o.teacher.encoder[0][1].training # batch norm sees its batch
    assert not m.eval().teacher.encoder[0][1].training

@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')
@pytest.mark.parametrize('norm', [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_weight_norm(norm):
    "In the middle of training, where `deepcopy` refuses the old one; what it computes from follows"
    torch.manual_seed(0)
    m = Student(nn.Sequential(nn.Flatten(), norm(nn.Linear(9,8))))
    m.encoder(torch.rand(2,1,3,3)).sum().backward()
    t = EMATeacher(m.encoder, m.projector)
    x = [torch.rand(4,1,3,3)]
    with torch.no_grad(): assert torch.equal(t.eval()(x), m.eval().projector(multicrop(m.encoder, x)))
    for p in m.parameters(): p.data.mul_(2)
    t.update(m, 0.)
    with torch.no_grad(): torch.testing.assert_close(t(x), m.projector(multicrop(m.encoder, x)))

# ---- in a fit

class Moves(Callback):
    "How often the teacher has moved, and by which momentum, after each batch"
    order = 90
    def before_fit(self): self.seen = []
    def after_batch(self):
        if self.training: self.seen.append((int(self.learn.model.teacher.updates), self.learn.byol.now['m']))

def fit(*cbs, n=40, epochs=2, **kwargs):
    torch.manual_seed(0)
    learn = learner('byol', loaders('byol', images(n), images(12)), cb=BYOL(augs('byol'), **kwargs), cbs=[Moves(), *cbs])
    quiet(learn, epochs)
    return learn

def cosine(start, end, share): return end+(start-end)*(1+math.cos(math.pi*share))/2

def test_moves_with_the_optimizer():
    assert fit(m=.9).moves.seen==[(i+1, pytest.approx(cosine(.9, 1, i/10))) for i in range(10)]
    assert [o for o,_ in fit(GradientAccumulation(16), n=32, m=.9).moves.seen]==[0,1,1,2,2,3,3,4] # two batches a step

def test_a_skipped_step_moves_nothing():
    class Skip(Callback):
        order = MixedPrecision.order
        def before_step(self):
            if self.train_iter in (0,3): raise CancelStepException
    assert [o for o,_ in fit(Skip(), epochs=1).moves.seen]==[0,1,2,2,3]

def test_begins_as_a_copy():
    "Of the weights that the student has when it is first trained; a second fit goes on"
    torch.manual_seed(0); learn = learner('byol', cb=BYOL(augs('byol'), m=1.))
    for p in learn.model.encoder.parameters(): p.data.add_(1)
    now = [o.clone() for o in learn.model.encoder.parameters()]
    quiet(learn, 1)
    assert all(torch.equal(a, b) for a,b in zip(learn.model.teacher.encoder.parameters(), now)) # m=1: it never moved since
    quiet(learn, 1)
    assert all(torch.equal(a, b) for a,b in zip(learn.model.teacher.encoder.parameters(), now)) and learn.model.teacher.updates==10

def test_lr_find_leaves_no_trace():
    torch.manual_seed(0); learn = learner('byol', loaders('byol', images(400)))
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=20, show_plot=False)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and learn.model.teacher.updates==0

def test_sees_the_assigning_views_only():
    seen = []
    torch.manual_seed(0); learn = learner('byol', cb=BYOL(augs('byol')+augs('byol', 8), crop_assgn_ids=[1,0]))
    teacher = learn.model.teacher
    forward = teacher.forward
    teacher.forward = lambda views: (seen.append([o is learn.byol.views[i] for o,i in zip(views, (1,0), strict=True)]), forward(views))[1]
    quiet(learn, 1)
    assert seen and all(o==[True,True] for o in seen)

@pytest.mark.parametrize('kwargs,says', [(dict(m=1.1), 'm=1.1 is a momentum'), (dict(m_end=-1), 'm_end=-1'), (dict(crop_assgn_ids=[0,2]), 'crop_assgn_ids=')])
def test_mistakes(kwargs, says):
    with pytest.raises(ValueError, match=says): BYOL(augs('byol'), **kwargs)

@pytest.mark.parametrize('name,kwargs', [('byol',{}), ('moco',dict(K=16)), ('moco',dict(K=16, crop_assgn_ids=[1])), ('moco',dict(K=None)), ('dino',{})], ids='byol queue one-direction batch dino'.split())
def test_agreement_is_watched(name, kwargs):
    "By the monitor: the mean cosine of what is said of each view and what the teacher says of each other one that it sees"
    class Seen(Callback):
        order = CollapseMonitor.order+1
        def before_fit(self): self.all = []
        def after_loss(self):
            if not self.training: return
            cb = learn.ssl
            said = (self.pred[1]-cb.ssl_model.centre if name=='dino' else self.pred).detach().chunk(len(self.xb[0]))
            told = cb.target-cb.ssl_model.centre if name=='dino' else cb.target
            asks = [i for i,v in enumerate(cb.views) if any(v is o for o in self.xb[0])]
            cos  = [torch.nn.functional.cosine_similarity(a[i], t[i], dim=0) for v,a in zip(asks, said) for u,t in zip(cb.crop_assgn_ids, told) if u!=v for i in range(len(a))]
            self.all.append(float(sum(cos)/len(cos)))
    torch.manual_seed(0)
    cb = callback(name, augs(name)[:2], **kwargs)
    learn = learner(name, cb=cb, cbs=[CollapseMonitor(every=1), Seen()])
    learn.ssl = cb
    quiet(learn, 2)
    assert len(learn.seen.all)==10
    torch.testing.assert_close(torch.tensor(learn.collapse_monitor.history['agreement']), torch.tensor(learn.seen.all), rtol=0, atol=1e-5)

def test_no_teacher_no_agreement():
    torch.manual_seed(0); learn = learner('simclr', cbs=CollapseMonitor(every=1))
    quiet(learn, 1)
    assert 'agreement' not in learn.collapse_monitor.history
