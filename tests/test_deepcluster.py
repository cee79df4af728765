"DeepCluster-v2: k-means, the loss, whole fits against loops, and a memory that nothing but training changes"
import math, re, warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find into Learner)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from fasttransform import Pipeline
from sklearn.metrics import normalized_mutual_info_score
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import methods, reference
from self_supervised import kmeans
from self_supervised.checkpoint import read_checked
from self_supervised.core import SSLCallback
from self_supervised.data import no_loss, tensor_dls
from self_supervised.diagnostics import CollapseMonitor
from self_supervised.dist import rank
from self_supervised.evaluation import OnlineKNN
from self_supervised.kmeans import spherical_kmeans
from self_supervised.replay import can_skip
from self_supervised.vision import deepcluster
from self_supervised.vision.deepcluster import DeepCluster, create_deepcluster_model, deepcluster_loss
from self_supervised.vision.sela import SeLa, create_sela_model
from self_supervised.watcher import Watcher

from processes import on_ranks
from test_checkpoint import Die, Shake, fit, items, make, outcome, same
from test_online import labelled
from test_swav import images, mixed, quiet, views_2, views_2_6

pytestmark = pytest.mark.slow
both = pytest.mark.parametrize('name', ['deepcluster', 'sela'])

def method(learn): return next(o for o in learn.cbs if isinstance(o, SSLCallback))

def unit(n, D=5, seed=0, dtype=torch.float64): return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1).to(dtype)


# The functions

@pytest.mark.parametrize('faiss', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('n,K,rounds', [(60,4,10), (60,4,1), (9,7,5), (5,5,3), (30,1,10)])
def test_kmeans_equals_loops(n, K, rounds, dtype, faiss):
    "With a centroid that is nobody's nearest, and so stays"
    x = unit(n).abs().to(dtype) # all on one side
    start = torch.cat([x[:K], -unit(1).abs().to(dtype)])
    want,labels = reference.spherical_kmeans(x.tolist(), start.tolist(), rounds)
    got,near = spherical_kmeans(x, start.clone(), rounds, faiss)
    torch.testing.assert_close(got, torch.from_numpy(want).to(dtype), rtol=1e-5, atol=1e-6)
    assert near.tolist()==labels.tolist() and near.dtype==torch.int64 and torch.equal(got[-1], start[-1])

def test_kmeans_in_blocks():
    "Products are made block by block; no tensor holds those of all rows"
    from test_sinkhorn import Look
    x,start = unit(5000, dtype=torch.float32),unit(1000, seed=1, dtype=torch.float32)
    with Look() as look: got = spherical_kmeans(x, start, 1)[1]
    assert max(n for n,_ in look.made) <= 2**21 < len(x)*len(start)
    assert torch.equal(got, (x@spherical_kmeans(x, start, 1)[0].T).argmax(1))

@pytest.mark.parametrize('V,H', [(2,1), (6,3)])
def test_loss_equals_loops(V, H):
    s,labels = torch.randn(V,4,H,5, dtype=torch.float64, requires_grad=True),torch.randint(5, (H,4))
    loss = deepcluster_loss(s, labels, .2)
    assert loss.item()==pytest.approx(reference.cluster_loss(s.tolist(), labels.tolist(), .2), rel=1e-10)
    want = sum(-(s[v,b,h]/.2).log_softmax(0)[labels[h,b]] for v in range(V) for b in range(4) for h in range(H))/(V*4*H)
    torch.testing.assert_close(*(torch.autograd.grad(o, s)[0] for o in (loss, want)), rtol=1e-10, atol=1e-12)


# Whole fits

class CheckStep(Callback):
    "Keep memory and labels in loops, and do each training step again, one view after the other"
    order = 20
    def __init__(self, x, assign, temp, every=1): self.x,self.assign,self.temp,self.every,self.n_checked,self.assigned,self.mem = x,assign,temp,every,0,[],None

    def project(self, m, v):
        z = m.projector(m.encoder(v))
        return torch.stack([r/(r*r).sum().sqrt() for r in z])

    def before_batch(self):
        cb,m,views = method(self.learn),deepcopy(self.learn.model),self.xb[0]
        self.pos = cb.crop_assgn_ids
        C = m.prototypes.weight
        heads = C.detach().unflatten(0, (m.n_heads,-1))
        ids = [((cb.aug_pipelines[0](self.x)-o).flatten(1).abs().sum(1)==0).nonzero().item() for o in views[0]] if self.training else []
        if self.training:
            with torch.no_grad():
                if self.mem is None: self.mem = [torch.cat([self.project(m, cb.aug_pipelines[a](self.x[i:i+1])) for i in range(len(self.x))]) for a in self.pos]
            if self.iter==0 and self.epoch%self.every==0:
                self.labels = [self.assign(cb, h, self.mem[h%len(self.mem)], heads[h]) for h in range(m.n_heads)]
                self.assigned.append(self.train_iter); self.protos = heads.clone()
            assert cb.labels.tolist()==[list(o) for o in self.labels] # of all images, those that a short last batch left out too
            torch.testing.assert_close(cb.memory, torch.stack(self.mem), rtol=1e-9, atol=1e-12)
        m.zero_grad()
        zs = [self.project(m, v) for v in views]
        scores = [(z@C.T).unflatten(1, (m.n_heads,-1)) for z in zs]
        labels = [[l[i] for i in ids] for l in self.labels] if self.training else [
            [max(range(s.shape[2]), key=s[b,h].tolist().__getitem__) for b in range(len(s))] for h in range(m.n_heads) for s in [scores[self.pos[h%len(self.pos)]]]]
        self.want = reference.cluster_loss([o.tolist() for o in scores], labels, self.temp)
        if not self.training: return
        loss = 0.
        for s in scores:
            for b in range(len(s)):
                for h in range(m.n_heads): loss = loss - (s[b,h]/self.temp).log_softmax(0)[labels[h][b]]/(len(views)*len(s)*m.n_heads)
        loss.backward()
        self.grads = {n:p.grad for n,p in m.named_parameters()}
        for mem,a in zip(self.mem, self.pos):
            for b,i in enumerate(ids): mem[i] = zs[a][b].detach()

    def after_loss(self):
        assert self.learn.loss.item()==pytest.approx(self.want, rel=1e-9)
        self.n_checked += 1

    def after_backward(self):
        for n,p in self.learn.model.named_parameters():
            if self.grads[n] is None: assert p.grad is None
            else: torch.testing.assert_close(p.grad, self.grads[n], rtol=1e-7, atol=1e-10, msg=n)
        torch.testing.assert_close(method(self.learn).memory, torch.stack(self.mem), rtol=1e-9, atol=1e-12)

def bn_free(create=create_deepcluster_model, **kwargs):
    enc = nn.Sequential(nn.Conv2d(1,6,3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return create(enc, **(dict(hidden_size=8, projection_size=5, n_protos=4, bn=False, n_heads=3) | kwargs))

def stepwise(cb, model, assign, temp=.2, every=1, drop_last=False, cbs=(), **kwargs):
    "A Learner in double precision whose steps are all done again"
    x = images().double()
    dls = tensor_dls(x, images(5, seed=1).double(), bs=6, drop_last=drop_last)
    learn = Learner(dls, model.double(), opt_func=SGD, lr=.5, cbs=[cb, CheckStep(x, assign, temp, every), *cbs], **kwargs)
    learn.remove_cb(Recorder) # it cannot average float64 losses
    return learn

setups = pytest.mark.parametrize('augs,ids,heads,drop,every', [(views_2,[0,1],3,False,2), (views_2_6,[4,1],2,True,1), (mixed,[2],2,False,1), (mixed,[3,0,1],4,True,2)],
                                 ids='2 2+6-other mixed-one mixed-three'.split())

@setups
@pytest.mark.parametrize('faiss', [False, True])
def test_fit_equals_definition(monkeypatch, augs, ids, heads, drop, every, faiss):
    "Memory, starts, centroids, labels, loss and gradients of three epochs; prototypes are the centroids, whatever the optimizer does"
    drawn,randperm = [],torch.randperm
    monkeypatch.setattr(torch, 'randperm', lambda *args, **kwargs: drawn.append(randperm(*args, **kwargs)) or drawn[-1])
    search,searched = kmeans._nearest_faiss,[]
    monkeypatch.setattr(kmeans, '_nearest_faiss', lambda *args: searched.append(1) or search(*args))
    def assign(cb, h, z, head):
        rows = drawn.pop(0)[:len(head)]
        centroids,labels = reference.spherical_kmeans(z.tolist(), z[rows].tolist(), 6)
        torch.testing.assert_close(head, torch.from_numpy(centroids), rtol=1e-6, atol=1e-8)
        return labels.tolist()
    class Fixed(Callback):
        order = 20
        def after_step(self): assert torch.equal(self.learn.model.heads, self.learn.check_step.protos)
    learn = stepwise(DeepCluster(augs, ids, temp=.2, n_kmeans_iter=6, assign_every=every, faiss=faiss), bn_free(n_heads=heads), assign, every=every, drop_last=drop,
                     cbs=[Fixed()], wd=.1, wd_bn_bias=True)
    quiet(learn, 3)
    n = 3 if drop else 4
    assert learn.check_step.n_checked==3*(n+1) and learn.check_step.assigned==[n*o for o in range(0, 3, every)] and not drawn
    assert len(searched)==(7*heads*len(learn.check_step.assigned) if faiss else 0) # six rounds, and the labels
    assert learn.deep_cluster.labels.shape==(heads,22) and learn.deep_cluster.memory.shape==(len(ids),22,5)

def test_codes_are_labels():
    learn = methods.learner('deepcluster')
    cb = method(learn)
    seen = []
    class Look(Callback):
        def after_loss(self): seen.append((self.training, cb.last_codes))
    learn.add_cb(Look())
    quiet(learn, 1)
    assert [o for o,_ in seen]==[True]*5+[False]*2
    for _,o in seen: assert o.shape[::2]==(3,10) and ((o==0)|(o==1)).all() and (o.sum(2)==1).all()
    assert cb.last_codes is None

def counted(monkeypatch):
    "How often the memory was filled"
    calls,fill = [],deepcluster.fill_memory
    monkeypatch.setattr(deepcluster, 'fill_memory', lambda *args: calls.append(1) or fill(*args))
    return calls

def state(learn):
    cb = method(learn)
    return dict(memory=cb.memory, labels=cb.labels, **learn.model.state_dict())

def snapshot(learn): return {k:None if v is None else v.clone() for k,v in state(learn).items()}

def test_lr_find_leaves_no_trace(tmp_path):
    "Before the first fit and after it"
    learn = methods.learner('deepcluster', path=tmp_path)
    for _ in range(2):
        before = snapshot(learn)
        with learn.no_bar(): learn.lr_find(num_it=12, show_plot=False, suggest_funcs=())
        assert same(before, state(learn))
        assert not hasattr(method(learn), '_kept')
        quiet(learn, 1)
    assert not same(before, state(learn))

def test_second_fit(monkeypatch):
    "Keeps the memory; other data or another model gets a new one"
    calls,learn = counted(monkeypatch),methods.learner('deepcluster')
    quiet(learn, 1); memory = learn.deep_cluster.memory
    quiet(learn, 1)
    assert len(calls)==1 and learn.deep_cluster.memory is memory
    learn.dls = tensor_dls(methods.images(33), methods.images(12), bs=8)
    quiet(learn, 1)
    assert len(calls)==2 and learn.deep_cluster.memory.shape==(2,33,8) and learn.deep_cluster.labels.shape==(3,33)
    learn.model,learn.opt = methods.model('deepcluster', projection_size=6),None
    quiet(learn, 1)
    assert len(calls)==3 and learn.deep_cluster.memory.shape==(2,33,6)
    learn.deep_cluster.crop_assgn_ids = [3]
    quiet(learn, 1)
    assert len(calls)==4 and learn.deep_cluster.memory.shape==(1,33,6)
    learn.model,learn.opt = methods.model('deepcluster', projection_size=6),None # of the same sizes
    quiet(learn, 1)
    assert len(calls)==5

def test_step_on_a_gpu_reads_nothing_back():
    "On a GPU that is not there, every number that the CPU asks for is an error"
    cb,m = methods.callback('deepcluster'),methods.model('deepcluster')
    with FakeTensorMode(allow_non_fake_inputs=True):
        cb.learn = SimpleNamespace(model=m, training=True, iter=0, dl=None)
        cb._ids = [torch.arange(8)]
        cb.memory,cb.labels = torch.zeros(2,40,8, device='cuda'),torch.zeros(3,40, device='cuda', dtype=torch.long)
        z,scores = (torch.randn(len(cb.aug_pipelines)*8, *o, device='cuda') for o in ((8,), (3,10)))
        assert cb.lf((z,scores)).is_cuda


# Exact resume

def run(folder, name, steps, epochs, seed=42, nth=None, **kwargs):
    learn = make(folder, name, seed=seed, steps=steps, **kwargs)
    learn.checkpoint.epochs = epochs
    if nth: learn.add_cb(Die('after_backward', nth))
    return learn

def check_resume(tmp_path, name, steps, epochs, nth, n=3, **kwargs):
    fit(whole := run(tmp_path/'whole', name, steps, epochs, **kwargs), n)
    with pytest.raises(KeyboardInterrupt): fit(run(tmp_path/'dying', name, steps, epochs, nth=nth, **kwargs), n)
    learn = run(tmp_path/'dying', name, steps, epochs, seed=7, **kwargs)
    class Look(Watcher):
        order = method(learn).order-1 # once the views are made, the images are in their place no more
        def before_batch(self): self.images = self.xb[0]
        def after_loss(self):
            if self.training: seen.append((self.images, method(self.learn)._ids[self.iter]))
    seen = []
    learn.add_cb(Look())
    learn.resume(); fit(learn, n)
    assert same(outcome(whole), outcome(learn)) and same(state(whole), state(learn))
    return learn,seen

@pytest.mark.parametrize('steps,epochs,nth', [(3,None,8), (5,None,7), (None,1,8)], ids=['mid-epoch','last-batch','epoch'])
def test_resume(tmp_path, steps, epochs, nth):
    "Three epochs of five batches; what was saved in a step or between epochs is the whole state; and the numbers of the images are those of the dataset"
    learn,seen = check_resume(tmp_path, 'deepcluster', steps, epochs, nth)
    assert len(seen)==15-(steps*((nth-1)//steps) if steps else 5)
    for x,ids in seen: assert torch.equal(x, methods.images()[ids])

@pytest.mark.parametrize('dls,skip', [((2,),True), ((0,Shake),True), ((2,Shake),False)], ids=['workers','random','random-workers'])
def test_resume_of_other_loaders(tmp_path, dls, skip):
    "In the middle of an epoch, with a loader that leaves out what was seen and one that reads it again"
    learn,seen = check_resume(tmp_path, 'deepcluster', 3, None, 8, 2, dls=lambda: items(*dls), loss_func=no_loss)
    assert can_skip(learn.dls.train)==skip and len(seen)==4
    for x,ids in seen: # what shakes them adds up to ten, and cuts at 255
        d = x.float()-methods.images()[ids].float()
        assert ids.dtype==torch.int64 and d.min()>=0 and d.max()<=(10 if len(dls)>1 else 0)

def two(folder):
    learn = make(folder/'run', 'deepcluster', steps=2)
    learn.add_cb(Die('after_backward', 4)) # of 3 steps an epoch
    with learn.distrib_ctx():
        with pytest.raises(KeyboardInterrupt): fit(learn)
    return rank()

def test_resume_on_another_number_of_processes(tmp_path):
    "Saved in the first epoch by two, read by one: it goes on with the memory, labels and prototypes of all images"
    on_ranks(two, tmp_path, 2)
    learn = make(tmp_path/'run', 'deepcluster', seed=7, steps=None)
    saved = read_checked(learn.checkpoint.files[-1])
    (nm,cb), = [(k,o) for k,o in saved['cbs'].items() if 'memory' in o]
    assert (saved['epoch'], saved['batch'])==(0, 2) and cb['memory'].shape==(2,40,8) and cb['labels'].shape==(3,40) and '_kept' not in cb
    seen = []
    class Look(Callback):
        order = 50
        def before_batch(self): seen.append(snapshot(self.learn))
    learn.add_cb(Look())
    with pytest.raises(ValueError, match='processes: 2 → 1'): learn.resume(); fit(learn)
    allow = re.findall(r"'([\w.]+)'", str(pytest.raises(ValueError, lambda: (learn.resume(), fit(learn))).value).rpartition('override=')[2])
    learn.resume(override=allow); fit(learn)
    want = dict(memory=cb['memory'], labels=cb['labels'], **{k:v for k,v in saved['model'].items()})
    assert 'processes' in allow and same({k:seen[0][k] for k in want}, want)
    assert learn.recorder.losses[-1].isfinite()


# Does it work?

@both
def test_recovers_known_clusters(name):
    "Six clusters of noisy patterns: labels find them"
    g = torch.Generator().manual_seed(0)
    protos,y = torch.rand(6,1,8,8, generator=g),torch.arange(300)%6
    x = (protos[y]+.1*torch.randn(300,1,8,8, generator=g)).clamp(0,1)
    noisy = lambda: Pipeline([lambda x: x+.1*torch.randn_like(x)], split_idx=0)
    cls,create = dict(deepcluster=(DeepCluster, create_deepcluster_model), sela=(SeLa, create_sela_model))[name]
    model = create(nn.Sequential(nn.Flatten(), nn.Linear(64,32)), 32, 16, n_protos=8 if name=='deepcluster' else 6, n_features=32, n_heads=2)
    learn = Learner(tensor_dls(x, bs=60), model, lr=3e-3, cbs=cls([noisy(), noisy()]))
    quiet(learn, 30)
    for o in method(learn).labels: assert normalized_mutual_info_score(y, o) > .85

def test_monitor_and_knn():
    "Columns of both, and quantities that are numbers"
    learn = methods.learner('deepcluster', cbs=[(m := CollapseMonitor(every=2, warmup=1000)), OnlineKNN(labelled(), k=3)])
    quiet(learn, 2)
    assert {'loss-chance','protos','std','rank','knn'} <= set(learn.recorder.metric_names)
    assert all(math.isfinite(v) for k in ('loss-chance','protos','std','rank','mean_entropy','code_entropy') for v in m.history[k])
    assert all(v==pytest.approx(0, abs=1e-6) for v in m.history['code_entropy']) # labels are hard
    assert len(learn.online_knn.history)==2

class Constant(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1,8))
    def forward(self, x): return self.w.expand(len(x), -1)

@both
def test_constant_encoder_warns(name):
    learn = methods.learner(name, m=methods.model(name, enc=Constant(), bn=False, n_features=8), cbs=[CollapseMonitor(every=1, patience=2, warmup=0)])
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        quiet(learn, 2)
    said = [str(o.message) for o in w if 'looks like a collapse' in str(o.message)]
    assert len(said)==1 and 'projection std 0' in said[0]
    cls,other = methods.methods[name].callback,{'deepcluster':'sela', 'sela':'deepcluster'}[name]
    assert f'create_{name}_model(n_protos=5), now 10' in said[0] and f'get_{name}_aug_pipelines' in said[0] and other not in said[0]
    for arg in re.findall(rf'{cls.__name__}\((\w+)=', said[0]): assert arg in methods.taken(cls, **{arg:0})
    for arg in re.findall(rf'{methods.methods[name].create_model.__name__}\((\w+)=', said[0]): assert arg in ('n_protos','bn')
    assert 'K=' not in said[0] and 'queue' not in said[0] and 'a batch of' not in said[0] and 'hard_codes' not in said[0]
    assert ('eps=' in said[0])==(name=='sela')


# What it says

@pytest.mark.parametrize('kwargs,msg', [
    (dict(aug_pipelines=views_2[:1]), 'DeepCluster compares 2 views of an image or more, and aug_pipelines has only one: give more pipelines'), (dict(crop_assgn_ids=[0,2]), r'crop_assgn_ids=\[0, 2\].*0 to 1'),
    (dict(temp=0), 'temp=0 must be positive: 0.1 is usual'), (dict(n_kmeans_iter=0), 'n_kmeans_iter=0 and assign_every=1 must be 1 or more: 10 and 1 are usual'),
    (dict(assign_every=0), 'n_kmeans_iter=10 and assign_every=0 must be 1 or more')])
def test_wrong_arguments(kwargs, msg):
    with pytest.raises(ValueError, match=msg): DeepCluster(**{'aug_pipelines':views_2, **kwargs})

def test_faiss_is_missing(monkeypatch):
    monkeypatch.setattr(deepcluster, 'find_spec', lambda name: None)
    DeepCluster(views_2)
    with pytest.raises(ValueError, match=r"faiss=True needs FAISS: pip install 'self_supervised\[faiss\]', or leave it out"): DeepCluster(views_2, faiss=True)

class Stopped(Exception): pass
class Stop(Callback):
    order = 50
    def before_train(self): raise Stopped

@pytest.mark.parametrize('model,msg', [
    (lambda: nn.Linear(1,1), r'the model is a Linear, and DeepCluster trains a DeepClusterModel: make it with create_deepcluster_model\(encoder\)'),
    (lambda: bn_free(create_sela_model), 'the model is a SeLaModel, and DeepCluster trains a DeepClusterModel'),
    (lambda: bn_free(n_protos=23), '23 clusters of 22 images: create the model with n_protos=2 or fewer')])
def test_wrong_models(model, msg):
    with pytest.raises(ValueError, match=msg): quiet(Learner(tensor_dls(images(), bs=6), model(), cbs=[DeepCluster(views_2), Stop()]), 1)

def test_as_many_clusters_as_images():
    quiet(Learner(tensor_dls(images(), bs=6), bn_free(n_protos=22), cbs=DeepCluster(views_2)), 1)

def test_wrong_loaders():
    "Before any work"
    def fit(dl): quiet(Learner(DataLoaders(dl, dl), bn_free(), loss_func=no_loss, cbs=[DeepCluster(views_2), Stop()]), 1)
    with pytest.raises(TypeError, match='give a dataset with a length and an index to fastai.data.load.DataLoader'): fit(torch.utils.data.DataLoader(images(), 6))
    with pytest.raises(ValueError, match='stream without a length'): fit(DataLoader(iter(images()), bs=6))

def test_processes_with_loaders_of_their_own(monkeypatch):
    monkeypatch.setattr(deepcluster, 'world_size', lambda: 2)
    with pytest.raises(ValueError, match=r'the numbers of their images mean different ones: fit inside `with learn.distrib_ctx\(\):`'): quiet(methods.learner('deepcluster'), 1)
