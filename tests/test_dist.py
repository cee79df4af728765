"Two and three processes (gloo, CPU) give what one gives on the joined batch"
from contextlib import redirect_stdout
from functools import lru_cache, partial
from io import StringIO

import pytest, torch
import torch.distributed as tdist
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find into Learner)
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn

from self_supervised import dist
from self_supervised.data import tensor_dls
from self_supervised.dist import all_gather, all_mean, all_reduce, rank, rank_sizes, world_size
from self_supervised.queue import FeatureQueue
from self_supervised.sinkhorn import sinkhorn_knopp
from self_supervised.vision.simclr import DistributedSimCLR, SimCLR, nt_xent_loss
from self_supervised.vision.swav import SWAV, create_swav_model, get_swav_aug_pipelines

from methods import callback, corners, loaders, methods, model, taken, worst_difference
from processes import on_ranks

pytestmark = pytest.mark.slow


# The functions

def data(n=6, k=4, seed=0): return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

sizes = {2:[4,2], 3:[1,4,2]} # of uneven batches
def share(x, n, r): return x.split(sizes[n])[r]

def functions(folder):
    "Everything at once, as starting processes is what takes the time"
    r,n = rank(),world_size()
    mine = data()[r*6//n:(r+1)*6//n].requires_grad_()
    joined = all_gather(mine)
    (joined**3).sum().mul(r+1.).backward() # a loss on each rank, with another weight
    q,s = FeatureQueue(length=7),data().chunk(n)[r].detach()
    for _ in range(2): q.push(torch.stack([s, -s]))

    x = data(sum(sizes[n]))
    u = share(x, n, r).clone().requires_grad_()
    loss = all_mean(u.square().mean(), len(u)); loss.backward()
    uq = FeatureQueue(length=9); uq.push(torch.stack([share(x, n, r)]*2))
    z = torch.cat([share(o, n, r) for o in views(n)]).requires_grad_()
    nt = all_mean(nt_xent_loss(z, .3, n_views=3), sizes[n][r]); nt.backward()
    backend,tdist.get_backend = tdist.get_backend,lambda: 'nccl' # then numbers travel between the CPUs all the same
    try: between_cpus = [rank_sizes(share(x, n, r)) for _ in range(3)]
    finally: tdist.get_backend = backend
    assert len(dist._between_cpus)==1
    return dict(between_cpus=between_cpus, me=(rank(), world_size()), joined=joined.detach(), grad=mine.grad, total=all_reduce(s.sum(0)), top=all_reduce(s.amax(0), 'max'),
                columns=all_gather(s.T.contiguous().T), codes=sinkhorn_knopp(s), large=sinkhorn_knopp(s*1e4), queue=q.feats, local=q.local,
                sizes=rank_sizes(u), uneven=all_gather(share(x, n, r)), uneven_queue=uq.feats, uneven_codes=sinkhorn_knopp(share(x, n, r)),
                mean=loss.detach(), mean_grad=u.grad, nt=nt.detach(), nt_grad=z.grad)

def views(n): return [data(sum(sizes[n]), seed=i) for i in (1,2,3)]

@pytest.mark.parametrize('n', [2, 3])
def test_functions(n, tmp_path):
    x,res = data(),on_ranks(functions, tmp_path, n)
    one = FeatureQueue(length=7)
    for _ in range(2): one.push(torch.stack([x, -x]))
    for r,o in enumerate(res):
        assert o['me']==(r, n) and o['between_cpus']==[sizes[n]]*3
        assert torch.equal(o['joined'], x) and torch.equal(o['columns'], x)
        torch.testing.assert_close(o['total'], x.sum(0)); assert torch.equal(o['top'], x.amax(0))
        assert torch.equal(o['queue'], one.feats)
    # the gradient of a row is what the losses of all ranks say of it: weights 1 + 2 (+ 3)
    torch.testing.assert_close(torch.cat([o['grad'] for o in res]), 3*x**2*sum(range(1, n+1)))
    torch.testing.assert_close(torch.cat([o['codes'] for o in res]), sinkhorn_knopp(x))
    torch.testing.assert_close(torch.cat([o['large'] for o in res]), sinkhorn_knopp(x*1e4))
    parts = torch.cat([o['local'] for o in res], 1) # every projection is brought along by exactly one rank
    assert sorted(parts[0].tolist())==sorted(one.feats[0].tolist())

    # batches of different sizes
    x = data(sum(sizes[n])).requires_grad_(); mean = x.square().mean(1).mean(); mean.backward()
    z = torch.cat(views(n)).requires_grad_(); nt = nt_xent_loss(z, .3, n_views=3); nt.backward()
    nt_grad = [torch.cat([share(o, n, r) for o in z.grad.chunk(3)]) for r in range(n)]
    one = FeatureQueue(length=9); one.push(torch.stack([x,x]))
    for r,o in enumerate(res):
        assert o['sizes']==sizes[n] and torch.equal(o['uneven'], x) and torch.equal(o['uneven_queue'], one.feats)
        torch.testing.assert_close(o['mean'], mean.detach()); torch.testing.assert_close(o['nt'], nt.detach())
        torch.testing.assert_close(o['mean_grad']/n, share(x.grad, n, r)) # after DDP's average
        torch.testing.assert_close(o['nt_grad']/n, nt_grad[r])
    torch.testing.assert_close(torch.cat([o['uneven_codes'] for o in res]), sinkhorn_knopp(x.detach()))

def test_one_process():
    x = data()
    assert all_gather(x) is x and all_reduce(x) is x and all_mean(x, 6) is x and rank_sizes(x)==[6] and (rank(), world_size())==(0, 1)


# Training: a fit on N ranks, and the same steps on one process with the batches of the ranks joined

n_images,bs = 22,3 # on 2 ranks 3+3+3+2 images each; on 3, after two images are dealt twice, 3+3+2
def pictures(): return torch.rand(n_images, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

def no_bn_encoder(): return nn.Sequential(nn.Conv2d(1,6,3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
def no_bn_model(name): return model(name, enc=no_bn_encoder(), **taken(methods[name].create_model, bn=False))
multi = 8,8,5,5,5

cases = {nm: (nm, partial(callback, nm, corners(*multi))) for nm in methods} | dict( # every method on multi-crop, and
    two_views   = ('simclr', lambda: SimCLR(corners(8,8), temp=.2)),
    distributed = ('simclr', lambda: DistributedSimCLR(corners(8,8), temp=.2)),
    no_queue    = ('swav',   lambda: SWAV(corners(*multi), [0,1], K=None, freeze_prototypes_niters=0)),
    queue       = ('swav',   lambda: SWAV(corners(*multi), [0,1], K=10, queue_start_pct=.3)))

class Record(Callback):
    "Loss and all gradients of every step, as the optimiser gets them"
    order = 60
    def before_fit(self): self.steps = []
    def before_step(self): self.steps.append(dict(loss=self.learn.loss.detach(), **{n.removeprefix('module.'):p.grad.clone() for n,p in self.learn.model.named_parameters() if p.grad is not None}))

def learner(case, x, bs, folder, order=None):
    set_seed(7)
    nm,cb = cases[case]
    dls = loaders(nm, x, x[:7], bs=bs, drop_last=False)
    dls.train.shuffle = False
    if order: dls.train.get_idxs = lambda: order
    learn = Learner(dls, no_bn_model(nm).double(), opt_func=SGD, path=folder, cbs=[cb(), Record()])
    learn.remove_cbs([Recorder, ProgressCallback]) # fastai's Recorder cannot average losses in float64
    return learn

def result(learn): return learn.record.steps, {k:v.clone() for k,v in learn.model.state_dict().items()}

def train(case, bs, folder, load=None, save=None, order=None):
    learn = learner(case, pictures(), bs, folder, order)
    if load: learn.load(load)
    with learn.distrib_ctx(): learn.fit(2, lr=.1, wd=0.)
    if save: learn.save(save)
    return result(learn)

def training(folder): return {c: train(c, bs, folder, save=f'{c}_{world_size()}') for c in cases}

def joined(n):
    "The numbers of the images in the order in which one process, with batches of N·bs, meets the joined batches of N ranks"
    ids = torch.arange(n_images)
    ids = torch.cat([ids, ids[:-n_images%n]]).chunk(n)
    return torch.cat([o for batches in zip(*(o.split(bs) for o in ids)) for o in batches]).tolist()

def assert_same_steps(many, one):
    "Every loss, gradient and final weight, to 1e-5 relative to the largest number of each"
    worst = worst_difference(*([*steps, state] for steps,state in (many,one)))
    assert worst < 1e-5
    return worst

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "n → the folder, and the results of every case on `n` ranks"
    @lru_cache
    def _get(n):
        folder = tmp_path_factory.mktemp(f'ranks{n}')
        return folder,on_ranks(training, folder, n)
    return _get

@pytest.mark.parametrize('n', [2, 3])
def test_fit_equals_one_process(n, trained, tmp_path, capsys):
    for c in cases:
        one = train(c, bs*n, tmp_path, order=joined(n))
        assert len(one[0])==2*((n_images+n-1)//n+bs-1)//bs
        worst = max(assert_same_steps(res[c], one) for res in trained(n)[1])
        with capsys.disabled(): print(f'\n{c} on {n} ranks against one process: {len(one[0])} steps, largest relative difference {worst:.1e}', end='')

def go_on(folder): return train('queue', bs, folder, load='queue_2')

def test_saved_on_two_loads_on_one_and_three(trained):
    folder,_ = trained(2)
    assert learner('queue', pictures(), bs, folder).load('queue_2').model.queue.feats.shape==(2,10,8)
    res = on_ranks(go_on, folder, 3)
    one = train('queue', bs*3, folder, load='queue_2', order=joined(3))
    for o in res: assert_same_steps(o, one)


def own_loaders(folder, x=None):
    "Each rank with a loader and a number of images of its own: nothing of fastai's deals them out evenly"
    x = share(pictures()[:6], world_size(), rank()) if x is None else x
    res = {}
    for c,(nm,_) in cases.items():
        if methods[nm].callback.assigns_all: continue # these need to know which image is which
        learn = learner(c, x, len(x), folder)
        learn.fit(1, lr=0.)
        res[c] = learn.record.steps[0]['loss'],getattr(learn.model, 'queue', learn.model).state_dict()
    return res

def test_loaders_of_ones_own(tmp_path):
    "Batches of 4 and 2 images have the loss, and leave the queue, of one of 6"
    one = own_loaders(tmp_path, pictures()[:6])
    for o in on_ranks(own_loaders, tmp_path, 2): torch.testing.assert_close(o, one)


# What else a fit on several processes does

def views_of_a_fit(learn):
    class Look(Callback):
        order = 20
        def before_fit(self): self.seen = []
        def before_batch(self): self.seen.append(torch.cat([o.flatten() for o in self.xb[0]]))
    with learn.no_bar(): learn.fit(1, cbs=(look:=Look()))
    return torch.stack(look.seen)

def everyday(folder):
    "Random views, batch norm, no validation images, lr_find: as a user would"
    torch.manual_seed(0)
    enc = nn.Sequential(nn.Conv2d(1,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    augs = get_swav_aug_pipelines((2,2), (12,6), jitter=False, bw=False, blur=False, stats=None)
    x = torch.rand(1,1,14,14).expand(40,-1,-1,-1) # one and the same image, so that only its views can differ
    learn = Learner(tensor_dls(x, bs=4), create_swav_model(enc, 8, 5, n_protos=7), path=folder, cbs=SWAV(augs, [0,1], K=12))
    progress = []
    with learn.distrib_ctx():
        before,rng = {k:v.clone() for k,v in learn.model.state_dict().items()},torch.get_rng_state()
        progress.append(hasattr(learn, 'progress'))
        with learn.no_bar(): lr = learn.lr_find(num_it=20, show_plot=False).valley
        trace = all(torch.equal(v.cpu(), before[k].cpu()) for k,v in learn.model.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
        views = [views_of_a_fit(learn) for _ in range(2)]
    with redirect_stdout(StringIO()) as out: learn.to_distributed(); learn.fit(1); learn.detach_distributed()
    learn.save('everyday')
    return dict(out=out.getvalue(), lr=lr, no_trace=trace, views=torch.stack(views), progress=progress, losses=[float(o) for o in learn.recorder.losses], values=[list(o) for o in learn.recorder.values],
                weights=[o.detach() for o in learn.model.parameters()], queue=learn.model.queue.feats, plain=type(learn.model).__name__,
                loaders=[type(o).__name__ for o in learn.dls])

def test_everyday(tmp_path):
    a,b = on_ranks(everyday, tmp_path, 2)
    assert a['lr']==b['lr'] and a['no_trace'] and b['no_trace']
    assert not any((v==w).all() for v in a['views'].flatten(0,1) for w in b['views'].flatten(0,1))                   # each rank its own views
    for o in (a,b): assert not torch.equal(o['views'][0], o['views'][1])                                             # and other ones in a second fit
    assert a['values']==b['values'] and a['losses']==b['losses']                                                     # the same numbers everywhere
    for v,w in zip(a['weights'], b['weights']): assert torch.equal(v, w)
    assert torch.equal(a['queue'], b['queue']) and a['queue'].shape==(2,12,5)
    assert a['progress']==[True] and b['progress']==[False]
    assert a['out'].count('train_loss')==1 and b['out']==''                                                          # one table
    assert [o.name for o in tmp_path.glob('models/*')]==['everyday.pth']                                             # one file, and nothing left of lr_find
    assert a['plain']=='SwAVModel' and a['loaders']==['TensorDL','TensorDL']

def test_one_process_that_is_not_wrapped(tmp_path, monkeypatch):
    "On a GPU Accelerate leaves the model of a single process as it is, and fastai looks for what DDP has"
    from accelerate import Accelerator
    monkeypatch.setattr(Accelerator, 'prepare', lambda self, m: m)
    case = next(iter(cases))
    learn = learner(case, pictures(), bs, tmp_path)
    m,loaders = learn.model,list(learn.dls.loaders)
    with learn.distrib_ctx(): learn.fit(2, lr=.1, wd=0.)
    assert learn.model is m and list(learn.dls.loaders)==loaders
    assert_same_steps(result(learn), train(case, bs, tmp_path))
