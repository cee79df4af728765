"The monitor's numbers against slow and closed forms, its warnings on runs made to collapse, and runs that are the same to the bit with and without it"
import io, itertools, math, pickle, random, warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt, numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find into Learner)
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, Recorder, load_learner
from fastai.torch_core import set_seed
from fastai.vision.all import ConvLayer, NormType
from torch import nn
from torch.nn import functional as F

from self_supervised.core import SSLCallback, ssl_callback
from self_supervised.data import fashion_mnist, tensor_dls
from self_supervised.diagnostics import CollapseMonitor, code_stats, effective_rank, projection_std
from self_supervised.vision.simclr import SimCLR, create_simclr_model, get_simclr_aug_pipelines
from self_supervised.vision.swav import SWAV, create_swav_model, get_swav_aug_pipelines

from methods import augs, callback, images, loaders, learner, methods, model, quiet
from processes import on_ranks

pytestmark = pytest.mark.slow

def told(learn, *args, **kwargs):
    "The monitor's warnings of a fit"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        quiet(learn, *args, **kwargs)
    return [str(o.message) for o in w if 'looks like a collapse' in str(o.message)]

def monitored(name='swav', n=40, bs=8, cb=None, m=None, **kwargs):
    return learner(name, loaders(name, images(n), images(12), bs=bs, seed=0), m=m, cb=cb, cbs=[CollapseMonitor(**kwargs)])


# The quantities

@pytest.mark.parametrize('n,d', [(40,12), (12,40), (16,16)])
def test_effective_rank(n, d):
    "Against the singular values of numpy, on spectra that are flat and steep"
    for power in (0, 1, 4):
        z = torch.randn(n, d)@torch.diag(torch.arange(1, d+1)**-float(power))
        s = np.linalg.svd(z.double().numpy(), compute_uv=False)
        p = s/s.sum()
        assert effective_rank(z)==pytest.approx(math.exp(-(p*np.log(p)).sum()), rel=1e-5)
        assert effective_rank(7*z)==pytest.approx(effective_rank(z), rel=1e-6)

def test_effective_rank_closed_forms():
    q,_ = torch.linalg.qr(torch.randn(50,50))
    for k in (1, 7, 50): assert effective_rank(q[:k])==pytest.approx(k, rel=1e-4)
    assert effective_rank(torch.ones(30,20))==pytest.approx(1, rel=1e-4)
    assert math.isnan(effective_rank(torch.full((4,3), math.nan)))

def test_projection_std():
    z = torch.randn(30,8)
    rows = [[v/math.sqrt(sum(o*o for o in r)) for v in r] for r in z.tolist()]
    want = sum(np.std([r[j] for r in rows]) for j in range(8))/8*math.sqrt(8)
    assert projection_std(z).item()==pytest.approx(want, rel=1e-5) and projection_std(9*z).item()==pytest.approx(want, rel=1e-5)
    assert projection_std(torch.ones(30,8)).item()==0
    assert projection_std(torch.cat([torch.eye(8),-torch.eye(8)])).item()==pytest.approx(1) # corners in all directions
    assert projection_std(torch.randn(20000,8)).item()==pytest.approx(1, abs=.01)

def slow_entropies(codes):
    "Of the mean of (B,K) codes and of each, by loops"
    ent   = lambda p: -sum(o*math.log(o) for o in p if o>0)
    rows  = codes.tolist()
    B,K   = codes.shape
    each  = sum(map(ent, rows))/B
    mean  = ent([sum(r[k] for r in rows)/B for k in range(K)])
    return mean/min(math.log(K), math.log(B)+each), each/math.log(K)

def slow_stats(codes):
    "Entropies and prototypes in use of (B,K) codes by loops; the expected number in use by going through all choices of B samples, or by drawing"
    rows,(B,K) = codes.tolist(),codes.shape
    if K**B<5000: expect = np.mean([len(set(o)) for o in itertools.product(range(K), repeat=B)])
    else: expect = np.mean([len({random.randrange(K) for _ in range(B)}) for _ in range(5000)])
    return *slow_entropies(codes), len({max(range(K), key=r.__getitem__) for r in rows})/expect

@pytest.mark.parametrize('B,K', [(4,6), (6,3), (8,40), (40,8)])
@pytest.mark.parametrize('sharp', [.1, 1., 5.])
def test_code_stats(B, K, sharp):
    codes = (torch.randn(2,B,K)*sharp).softmax(2)
    got,want = code_stats(codes),[np.mean(o) for o in zip(*map(slow_stats, codes))]
    for k,w,tol in zip(('mean_entropy','code_entropy','protos'), want, (1e-4,1e-4,.03)): assert got[k].item()==pytest.approx(w, rel=tol)

def test_code_stats_closed_forms():
    stats = lambda c: [o.item() for o in code_stats(c[None]).values()]
    assert stats(torch.full((16,4), .25))==pytest.approx([1, 1, 1/(4*(1-.75**16))])
    assert stats(torch.eye(16))==pytest.approx([1, 0, 16/(16*(1-(15/16)**16))])
    assert stats(torch.eye(16)[torch.zeros(16).long()])[:2]==[0, 0]
    assert stats(torch.eye(1000)[:16])[0]==pytest.approx(1) # no more than 16 of 1,000 can be used: balanced all the same


# The callback

class Spy(Callback):
    "What the monitor should see, from the model's output, one step after another"
    order = Recorder.order-4
    def before_fit(self): self.seen = []
    def after_loss(self):
        if not self.training: return
        s = ssl_callback(self.learn)
        q = s.queue
        z = self.pred[0] if isinstance(self.pred, tuple) else self.pred
        self.seen.append(dict(loss=self.learn.loss.item(), chance=s.chance, z=z.detach()[:len(s.views[0])].clone(), codes=None if s.last_codes is None else s.last_codes.clone(),
                              queue=q.feats.shape[1]/q.length if q is not None and len(q.feats) else None))

@pytest.mark.parametrize('name,every', [*((o,2) for o in methods), *(('swav',o) for o in (1,5,100))])
def test_history(name, every):
    "Every number of the history, recomputed, and the columns, which a fit takes with it; 5 steps an epoch, so every=100 is every=5"
    learn = monitored(name, every=every)
    quiet(learn, 3, cbs=(spy:=Spy()))
    h,gap = learn.collapse_monitor.history,min(every, 5)
    chance = methods[name].callback.chance is not None or 'chance' in vars(ssl_callback(learn)) # of all its callbacks, or of this one
    assert h['step']==list(range(gap, 16, gap)) and {len(o) for o in h.values()}=={15//gap} and all(type(v) in (int,float) for o in h.values() for v in o)
    for i,t in enumerate(h['step']):
        now = spy.seen[t-1]
        z = F.normalize(now['z'], dim=1)
        s = np.linalg.svd(z.double().numpy(), compute_uv=False); p = s[s>0]/s.sum()
        want = {'loss-chance': np.mean([o['loss'] for o in spy.seen[t-gap:t]])-(now['chance'] or 0.), 'rank': math.exp(-(p*np.log(p)).sum()), 'std': z.std(0, correction=0).mean().item()*z.shape[1]**.5}
        if not chance: del want['loss-chance'] # a method without it
        if now['codes'] is not None: want |= dict(zip(('mean_entropy','code_entropy'), np.mean([slow_entropies(o) for o in now['codes']], 0)))
        if now['queue'] is not None: want['queue'] = now['queue']
        for k,v in want.items(): assert h[k][i]==pytest.approx(v, rel=1e-3, abs=1e-5), k
    s = methods[name].callback
    assert ('protos' in h)==s.has_codes and ('queue' in h)==(s.queue is not None)
    assert learn.recorder.metric_names==['epoch','train_loss','valid_loss',*(['loss-chance'] if chance else []),*(['protos'] if s.has_codes else []),'std','rank','time'] and len(learn.metrics)==0
    for nm,v in zip(learn.recorder.metric_names[3:-1], learn.recorder.values[-1][2:]): assert v==h[nm][-1]

class Plain(SSLCallback):
    "A method without codes, chance, prototypes, queue and registry"
    def lf(self, pred): return (pred[::2]-pred[1::2]).square().mean()

def plain_learner(**kwargs): return Learner(tensor_dls(images(), bs=8), nn.Sequential(Views(), nn.BatchNorm1d(4)), cbs=[Plain(augs('simclr')), CollapseMonitor(**kwargs)])

class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(144, 4)
    def forward(self, x): return self.lin(torch.cat([o.flatten(1) for o in x]))

def test_method_that_has_little():
    learn = plain_learner(every=1, warmup=0, patience=2)
    learn.collapse_monitor.healthy['std'] = ('projection std', 2., math.inf)
    said, = told(learn, 2)
    assert list(learn.collapse_monitor.history)==['step','std','rank'] and learn.recorder.metric_names[3:-1]==['std','rank']
    assert 'projection std' in said and 'lr=' in said and 'prototypes' not in said
    assert learn.collapse_monitor.queue_jump is None and len(learn.collapse_monitor.plot())==2

class Whole(Plain):
    "A method that nobody else knows: its chance, codes, queue and remedies"
    has_codes,settling = True,7
    def before_fit(self): super().before_fit(); self.chance,self.queue_joined = .5,False
    def agreement(self, pred): return pred.new_tensor(.5)
    def lf(self, pred):
        self.queue_joined = self.learn.pct_train>.45
        self.last_codes   = F.one_hot(torch.arange(len(pred)//2)%4, 6)[None].float()
        return super().lf(pred)
    @property
    def queue(self): return SimpleNamespace(feats=torch.zeros(1,3,4), length=12)
    def remedies(self, state):
        self.told = state
        return ['this first', *state.change(settling=9, chance=.5, other=1), *state.create(width=(3,4)), *state.add_bn, *state.drop_bn]

def test_method_that_has_all():
    "The monitor asks the method, and believes it"
    learn = plain_learner(every=1, patience=4)
    learn.remove_cb(Plain); learn.add_cb(Whole(augs('simclr')))
    m = learn.collapse_monitor
    m.healthy['std'] = ('projection std', 2., math.inf)
    quiet(learn, 1, cbs=Fail('after_pred', 2, CancelFitException()))
    assert m.quiet==107
    m.warmup = 0
    said, = told(learn, 2)
    assert learn.recorder.metric_names[3:-1]==['loss-chance','protos','std','rank'] and set(m.history)==set(m.healthy)|{'step'}
    assert m.history['agreement']==[.5]*10 and m.history['queue']==[.25]*10 and m.history['code_entropy']==[0]*10 and m.queue_start==6
    assert learn.whole.told.queue_start is None and learn.whole.told.batch==8 # four checks up to step 4
    assert order(said)==['this first', 'Whole(settling=9), now 7', 'the model(width=3), now 4', 'the model(bn=False), now True']
    assert m.history['loss-chance'][0]==pytest.approx(float(learn.recorder.losses[0])-.5, rel=1e-4) # later ones are smoothed there

def test_settling_is_counted_in_steps_of_the_optimizer():
    learn = monitored(cb=callback('swav', freeze_prototypes_niters=30))
    quiet(learn, 9, cbs=[GradientAccumulation(16), Fail('after_pred', 2, CancelFitException())]) # a step every two batches of 8
    assert learn.collapse_monitor.quiet==pytest.approx(100+30*45/22)

def trace(learn):
    "All that a run leaves: weights, buffers, queue, losses, and where the random generators are"
    return ({k:v.clone() for k,v in learn.model.state_dict().items()}, [float(o) for o in learn.recorder.losses], torch.get_rng_state(), random.getstate(),
            np.random.get_state()[1].tolist(), learn.dls.train.rng.getstate(), [o.training for o in learn.model.modules()], [p.requires_grad for p in learn.model.parameters()])

def assert_same(a, b):
    assert a[0].keys()==b[0].keys() and all(torch.equal(v, b[0][k]) for k,v in a[0].items())
    assert torch.equal(a[2], b[2]) and a[1]==b[1] and a[3:]==b[3:]

def data(labelled):
    y = torch.arange(40)%3
    return tensor_dls(*((images(),y),(images(12),y[:12])) if labelled else (images(),images(12)), bs=8, seed=0)

@pytest.mark.parametrize('name,labelled', [*((o,methods[o].callback.needs_labels) for o in methods), ('swav',True)])
def test_bit_identical(name, labelled):
    "With batch norm, dropout and queue, warning or not"
    def _run(*cbs):
        set_seed(3)
        enc   = nn.Sequential(nn.Conv2d(1,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        learn = learner(name, data(labelled), model(name, enc=enc), cbs=cbs)
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); quiet(learn, 3, .05)
        return learn
    a = trace(_run())
    watched = _run(CollapseMonitor(every=1, patience=1, warmup=0))
    watched.collapse_monitor.plot(); plt.close('all')
    assert_same(a, trace(watched))

@pytest.mark.parametrize('name', ['swav', 'simclr'])
def test_lr_find(name):
    "No columns, no trace, and what the last fit has seen is kept"
    learn = monitored(name, every=1)
    quiet(learn, 1)
    seen = pickle.dumps(learn.collapse_monitor.history)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=8, show_plot=False)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and pickle.dumps(learn.collapse_monitor.history)==seen and len(learn.metrics)==0

def test_second_fit():
    "A new history, and it may warn again"
    learn = monitored(every=1, patience=2, warmup=0)
    learn.collapse_monitor.healthy['std'] = ('projection std', 2., math.inf)
    assert len(told(learn, 2))==1 and learn.collapse_monitor.history['step']==list(range(1,11))
    assert len(told(learn, 1))==1 and learn.collapse_monitor.history['step']==list(range(1,6))

class Fail(Callback):
    def __init__(self, event, n, ex): self.event,self.n,self.ex = event,n,ex
    def __call__(self, event):
        if event==self.event and self.learn.training and self.learn.train_iter==self.n: raise self.ex

@pytest.mark.parametrize('event', ['after_loss','after_backward']) # before the monitor's own event, and after it
def test_exception(event, tmp_path):
    "Fails, exports, and fits again"
    learn = monitored(every=2)
    learn.path = tmp_path
    with pytest.raises(RuntimeError, match='on purpose'): quiet(learn, 2, cbs=Fail(event, 3, RuntimeError('on purpose')))
    assert learn.collapse_monitor._seen
    learn.export()
    quiet(learn, 1)
    assert learn.collapse_monitor.history['step']==[2,4] and len(learn.metrics)==0

@pytest.mark.parametrize('event', ['after_loss','after_backward'])
def test_batches_that_are_skipped(event):
    learn = monitored(every=1)
    quiet(learn, 1, cbs=Fail(event, 0, CancelBatchException()))
    assert learn.collapse_monitor.history['step']==([2,3,4,5] if event!='after_backward' else [1,2,3,4,5])

def test_export(tmp_path):
    "What is seen goes with the Learner; nothing large is left behind"
    learn = monitored(every=2)
    learn.path = tmp_path
    quiet(learn, 2)
    m = learn.collapse_monitor
    assert m._seen is None and not any(isinstance(o, torch.Tensor) for v in vars(m).values() for o in (v if isinstance(v, list) else [v]))
    learn.export()
    again = load_learner(tmp_path/'export.pkl').collapse_monitor
    assert again.history==m.history and again.healthy==m.healthy and len(again.plot())==7
    m._seen = 1,2,lambda: None # an event of a GPU cannot be pickled either
    assert pickle.load(io.BytesIO(pickle.dumps({k:v for k,v in m.__getstate__().items() if k in ('_seen','history')})))['_seen'] is None

def test_errors():
    for kw in (dict(every=0), dict(patience=0)):
        with pytest.raises(ValueError, match='every=.* and patience=.*20 and 5 are usual'): CollapseMonitor(**kw)
    learn = Learner(tensor_dls(images(), bs=8), model('swav'), cbs=CollapseMonitor())
    with pytest.raises(ValueError, match=rf'no self-supervised method .* such as {next(iter(methods.values())).callback.__name__}\('): learn.fit(1)
    with pytest.raises(ValueError, match='nothing has been seen .* every to less than 20'): CollapseMonitor().plot()


# Signs, warnings and remedies

def judged(*seen, patience=5, warmup=0, **kwargs):
    "The monitor after it has read these numbers, one check after another, and what it said; healthy where nothing is given"
    learn = monitored(every=1, **kwargs)
    told(learn, 1) # batch, optimiser and columns are there
    m,fine = learn.collapse_monitor,{'loss-chance':-1.,'mean_entropy':1.,'code_entropy':.5,'protos':1.,'std':.8,'rank':64}
    m.history,m.warning,m.bad,m.queue_start,m.patience,m.quiet = {},'',0,None,patience,warmup
    m.ssl.views = [torch.zeros(8,1,12,12)]
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for i,o in enumerate(seen):
            o = fine|o
            gram = torch.eye(64) if o.pop('rank')==64 else torch.ones(64,64)
            m._seen = {'step':i+1},list(o),(torch.tensor(list(o.values())), gram.double()),None
            m._read()
    return m,[str(o.message) for o in w]

bad = {'std':.01}

def test_patience_and_warmup():
    assert judged(*[bad]*4, patience=5, warmup=0)[1]==[]
    assert judged(*[bad]*4, {}, *[bad]*4, patience=5, warmup=0)[1]==[] # not in a row
    m,said = judged(*[bad]*30, patience=5, warmup=0)
    assert len(said)==1 and said[0]==m.warning and 'for 5 checks up to step 5: projection std 0.01 (healthy: 0.1 or more).' in said[0]
    assert judged(*[bad]*14, patience=5, warmup=10)[1]==[] and 'up to step 15' in judged(*[bad]*15, patience=5, warmup=10)[1][0]

def test_default_warmup():
    def _quiet(n_epoch=1, **kwargs):
        learn = monitored(cb=callback('swav', **kwargs))
        quiet(learn, n_epoch)
        return learn.collapse_monitor.quiet
    assert _quiet()==100 and _quiet(freeze_prototypes_niters=300)==400
    learn = monitored()
    quiet(learn, 1200, cbs=Fail('after_pred', 2, CancelFitException()))
    assert learn.collapse_monitor.quiet==.02*1200*5

def test_nan_counts_at_once():
    m,said = judged(*[{'loss-chance':math.nan}]*3, patience=3, warmup=1000)
    assert len(said)==1 and 'loss − chance nan' in said[0] and '\n1. lr=' in said[0]

@pytest.mark.parametrize('sign', [{'loss-chance':0.}, {'mean_entropy':.6}, {'code_entropy':.99}, {'protos':.3}, {'std':.05}, {'rank':1}])
def test_each_sign(sign):
    m,said = judged(*[sign]*2, patience=2, warmup=0)
    assert len(said)==1 and all(m.healthy[k][0] in said[0] for k in sign) and said[0].count('healthy:')==1

def test_loss_that_climbs_back():
    down = [{'loss-chance':-.1*i} for i in range(1, 11)]
    assert judged(*down, *[{'loss-chance':-.6}]*5, patience=2, warmup=0)[1]==[]
    m,said = judged(*down, *[{'loss-chance':-.4}]*2, patience=2, warmup=0)
    assert len(said)==1 and 'loss − chance -0.4 (healthy: -0.5 or less)' in said[0]
    assert [m.limits('loss-chance', i)[1] for i in (1,4,10,12)]==pytest.approx([-.05,-.2,-.5,-.5])
    assert m.limits('rank')==(2.5, math.inf)

def order(said): return [o.split('. ', 1)[1] for o in said.split('\n') if o[:1].isdigit()]

def test_remedies_name_arguments_and_values():
    tips = judged(bad, patience=1, warmup=0)[0].remedies()
    assert tips[0]=='SWAV(eps=0.03), now 0.05' and tips[1]=='SWAV(hard_codes=True), now False'
    assert 'create_swav_model(bn=False), now True' in tips and any(o.startswith('get_swav_aug_pipelines') and o.endswith('now 4') for o in tips)
    assert tips[-1]=='lr=0.0001 or lower, now 0.001' and 'SWAV(freeze_prototypes_niters=200), now None' in tips
    m,_ = judged(bad, patience=1, warmup=0, cb=callback('swav', eps=.01, hard_codes=True, freeze_prototypes_niters=500), m=model('swav', bn=False, n_protos=200))
    tips = m.remedies()
    assert 'SWAV(eps=0.006), now 0.01' in tips and not any('hard_codes' in o for o in tips) and 'SWAV(freeze_prototypes_niters=1000), now 500' in tips
    assert 'create_swav_model(bn=True), now False' in tips and 'create_swav_model(n_protos=10), now 200' in tips
    assert tips[0]=='a batch of 64 or more, now 8'

def test_remedies_by_sign():
    "What has most likely done it comes first"
    m,said = judged({'loss-chance':-.5}, {'loss-chance':3.}, patience=1, warmup=0)
    assert order(said[0])[0].startswith('lr=')
    assert order(judged({'std':1e-5}, patience=1, warmup=0)[1][0])[0].startswith('learn.swav.show()')
    m,_ = judged({'protos':.2}, patience=1, warmup=0, cb=SWAV(augs('swav'), [0,1], K=500))
    m.queue_start = 1
    assert m.remedies()[:3]==['SWAV(K=32), now 500','SWAV(queue_start_pct=0.75), now 0.25','K=None, no queue'] and m.remedies()[-1].startswith('lr=')

def test_remedies_of_simclr():
    learn = monitored('simclr', every=1, patience=1, warmup=0)
    learn.collapse_monitor.healthy['std'] = ('projection std', 2., math.inf)
    tips = order(told(learn, 1)[0])
    assert tips[0].startswith('lr=') and 'SimCLR(temp=0.2), now 0.07' in tips and 'create_simclr_model(bn=True), now False' in tips and 'a batch of 64 or more, now 8' in tips
    assert not any(o in t for t in tips for o in ('eps','protos','SWAV','freeze'))

def test_queue():
    "Starts when it is full, not before `queue_start_pct`; the step of the loss is that of the stretches around"
    def _fit(start, K=12):
        learn = monitored(every=2, cb=SWAV(augs('swav'), [0,1], K=K, queue_start_pct=start))
        quiet(learn, 4)
        return learn.collapse_monitor
    m = _fit(0)
    assert m.queue_start==2 and m.history['queue'][:2]==[1.,1.]
    assert m.queue_jump==pytest.approx(m.history['loss-chance'][1]-m.history['loss-chance'][0])
    m = _fit(.5)
    assert m.queue_start==11 and m.queue_jump==pytest.approx(m.history['loss-chance'][6]-m.history['loss-chance'][4])
    m = _fit(0, K=100)
    assert m.queue_start==13 and m.history['queue'][:3]==pytest.approx([.16,.32,.48])
    assert _fit(1.).queue_jump is None

def test_queue_start_is_the_first_step_with_it():
    "The method's own decision, seen through the number of samples that Sinkhorn is given"
    import self_supervised.vision.swav as swav
    real,seen = swav.sinkhorn_knopp,[]
    swav.sinkhorn_knopp = lambda *a, queue=None, **kw: (seen.append(queue is not None), real(*a, queue=queue, **kw))[1]
    try:
        for start,K in ((0.,30), (.3,12), (.5,60)):
            learn = Learner(tensor_dls(images(), bs=8), model('swav'), cbs=[SWAV(augs('swav'), [0,1], K=K, queue_start_pct=start), CollapseMonitor(every=2)])
            seen.clear(); quiet(learn, 4)
            assert abs(learn.collapse_monitor.queue_start-seen[::2].index(True))<=1
    finally: swav.sinkhorn_knopp = real

def test_stop():
    learn = monitored(every=1, patience=3, warmup=2, stop=True)
    learn.collapse_monitor.healthy['std'] = ('projection std', 2., math.inf)
    said, = told(learn, 5)
    assert said.endswith('The fit ends here (stop=True).') and learn.train_iter==5 and learn.collapse_monitor.history['step']==[1,2,3,4,5]

def test_plot():
    learn = monitored(every=1)
    quiet(learn, 2)
    axes = learn.collapse_monitor.plot(figsize=(8,4))
    seen = [k for k in learn.collapse_monitor.healthy if k!='agreement'] # with no teacher
    assert [ax.get_title() for ax in axes]==[learn.collapse_monitor.healthy[k][0] for k in seen] and axes[0].figure.get_size_inches().tolist()==[8,4]
    for ax,k in zip(axes, seen, strict=True):
        line,*more = [o for o in ax.lines if o.get_alpha()!=0]
        assert line.get_xdata().tolist()==list(range(1,11)) and line.get_ydata().tolist()==learn.collapse_monitor.history[k]
        assert [o.get_xdata()[0] for o in more]==[learn.collapse_monitor.queue_start] and len(ax.collections)==1
    edge = lambda ax: ax.collections[0].get_paths()[0].vertices[:,1]
    assert edge(axes[4]).min()==pytest.approx(.1) and edge(axes[4]).max()==pytest.approx(axes[4].get_ylim()[1]) # std
    learn.collapse_monitor.history['loss-chance'] = [-.1*i for i in range(1, 11)]
    assert {*edge(learn.collapse_monitor.plot()[0]).round(3)} >= {round(-.05*i, 3) for i in range(2, 11)} # the limit moves with the best loss so far
    plt.close('all')
    learn = monitored('simclr', every=1)
    quiet(learn, 1)
    assert len(learn.collapse_monitor.plot())==3
    plt.close('all')


# Runs made to collapse, and runs that work

def conv(norm=NormType.Batch): return nn.Sequential(*(ConvLayer(i, o, stride=2, norm_type=norm) for i,o in ((1,16),(16,32),(32,64))), nn.AdaptiveAvgPool2d(1), nn.Flatten())

class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(64))
    def forward(self, x): return self.w.expand(len(x), -1)

grey = dict(jitter=False, bw=False, blur=False, stats=None)

def run(encoder=conv, bs=32, steps=200, lr=1e-3, bn=True, n_protos=100, crops=(2,), method='swav', seed=0, **kwargs):
    "The monitor after a run on Fashion-MNIST, and its warnings"
    set_seed(seed)
    if method=='swav':
        m  = create_swav_model(encoder(), n_protos=n_protos, bn=bn, n_features=64)
        cb = SWAV(get_swav_aug_pipelines(crops, (28,14)[:len(crops)], (.4,.1)[:len(crops)], (1.,.4)[:len(crops)], **grey), [0,1], **({'K':None}|kwargs))
    else: m,cb = create_simclr_model(encoder(), bn=bn, n_features=64),SimCLR(get_simclr_aug_pipelines(28, resize_scale=(.4,1.), **grey), .1)
    learn = Learner(tensor_dls(fashion_mnist()[0][0][:bs*steps//2], bs=bs), m, cbs=[cb, CollapseMonitor()])
    said = told(learn, 2, lr)
    return learn.collapse_monitor,said

sick = dict(constant=(dict(encoder=Constant), ['loss − chance','projection std 0 ','effective rank 1 ','entropy of codes 1 ','prototypes in use','show()']),
            constant_simclr=(dict(encoder=Constant, method='simclr'), ['loss − chance','projection std 0 ','effective rank 1 ','1. lr=']),
            lr_100_times=(dict(encoder=lambda: conv(None), bn=False, lr=.3), ['projection std','effective rank 1 ','1. lr=0.03 or lower, now 0.3']),
            protos=(dict(encoder=lambda: conv(None), bn=False, bs=8, n_protos=3000, crops=(2,4), seed=1), ['effective rank','1. a batch of 64 or more, now 8','create_swav_model(n_protos=10), now 3000']),
            queue=(dict(lr=3e-3, K=2048, queue_start_pct=0.), ['when the queue started, after step 64','1. SWAV(K=128), now 2048']))

@pytest.mark.parametrize('name', sick)
def test_warns(name):
    kwargs,words = sick[name]
    m,said = run(**kwargs)
    assert len(said)==1
    for o in words: assert o in said[0]

healthy = dict(swav=dict(n_protos=30), queue=dict(K=128, lr=3e-3), hard=dict(hard_codes=True, n_protos=300, bn=False), simclr=dict(method='simclr', lr=1e-4))

@pytest.mark.parametrize('name', healthy)
def test_silent(name):
    m,said = run(**healthy[name])
    assert not said and len(m.history['step'])==10


# Two processes

def two(folder):
    "Only the second process sees signs"
    from self_supervised.dist import rank
    torch.manual_seed(0)
    learn = Learner(tensor_dls(images(), images(12), bs=4), model('swav'), path=folder, cbs=[callback('swav'), CollapseMonitor(every=1, patience=2, warmup=2, stop=True)])
    learn.collapse_monitor.healthy = {'std': ('projection std', 2. if rank() else 0., math.inf)}
    with learn.distrib_ctx(): said = told(learn, 4)
    m = learn.collapse_monitor
    return dict(steps=m.history['step'], warning=m.warning, said=len(said), at=learn.train_iter, std=m.history['std'], loss=m.history['loss-chance'])

def test_all_ranks_stop_in_the_same_step(tmp_path):
    a,b = on_ranks(two, tmp_path, 2)
    assert a['steps']==b['steps']==[1,2,3,4] and a['at']==b['at']
    assert a['warning']=='' and b['warning'] and a['said']==b['said']==0 # a warning is for the first process only
    assert a['std']!=b['std'] and a['loss']==pytest.approx(b['loss']) # its own images, the joined loss
