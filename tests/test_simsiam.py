"SimSiam against a loop of its own, in float64"
import copy
from functools import lru_cache

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from fastai.torch_core import trainable_params
from torch import nn

from methods import Record, corners, monitored, small_encoder
from self_supervised.data import tensor_dls
from self_supervised.dist import all_mean
from self_supervised.optimizer import LARC
from self_supervised.recipes import get_recipe
from self_supervised.vision.simsiam import SimSiam, create_simsiam_model, get_simsiam_aug_pipelines, predictor_splitter, simsiam_loss

from processes import on_ranks

def loops(p, z, ids=(0,1)):
    "The definition, pair by pair and image by image"
    terms = [-sum(a*b for a,b in zip(p[v,i], z[k,i]))/(p[v,i].norm()*z[k,i].norm()) for k,a in enumerate(ids) for v in range(len(p)) if v!=a for i in range(p.shape[1])]
    return torch.stack(terms).mean()

@pytest.mark.parametrize('V,ids', [(2,(0,1)), (2,(1,)), (6,(0,1)), (5,(3,0,2))])
def test_loss(V, ids):
    torch.manual_seed(0)
    p,z = torch.randn(V,3,4, dtype=torch.float64, requires_grad=True),torch.randn(len(ids),3,4, dtype=torch.float64, requires_grad=True)
    a,b = simsiam_loss(p, z, ids),loops(p, z.detach(), ids)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(o, p)[0] for o in (a,b)), rtol=0, atol=1e-12)
    assert not torch.autograd.grad(simsiam_loss(p, z, ids), z, allow_unused=True)[0]
    assert simsiam_loss(p.bfloat16(), z.bfloat16(), ids).dtype==torch.float32


def small_model(bn=True): return create_simsiam_model(small_encoder(bn), 16, 6, bn=bn, predictor_size=16) # wide enough for no prediction to be zero

@pytest.mark.parametrize('accumulate', [False, True])
@pytest.mark.parametrize('sizes,ids', [((8,8),(0,1)), ((8,8,5,5,5,5),(0,1)), ((8,8),(1,))], ids='2 2+4 one'.split())
def test_ten_steps(sizes, ids, accumulate):
    "Loss, every gradient and weight, with a last batch that is short, and when two batches make a step"
    torch.manual_seed(0)
    x,bs,lr = torch.rand(22,1,12,12, dtype=torch.float64),4,.02
    model = small_model().double()
    plain = copy.deepcopy(model)
    dls = tensor_dls(x, bs=bs, drop_last=False, device='cpu')
    dls.train.shuffle = False
    learn = Learner(dls, model, opt_func=SGD, cbs=[SimSiam(corners(*sizes), crop_assgn_ids=ids), Record(), *([GradientAccumulation(2*bs)] if accumulate else [])])
    learn.remove_cbs([Recorder, ProgressCallback])
    learn.fit(2, lr=lr, wd=0.)

    plain.train()
    n = done = 0
    for i,batch in enumerate([*x.split(bs), *x.split(bs)]):
        views = [o(batch) for o in corners(*sizes)]
        sized = [torch.cat(views[:2]), *([torch.cat(views[2:])] if len(views)>2 else [])] # a batch norm sees all views of a size together
        z = plain.projector(torch.cat([plain.encoder(o) for o in sized]))
        loss = loops(plain.predictor(z).view(len(views),-1,6), z.detach().view(len(views),-1,6)[list(ids)], ids)
        (loss*(len(batch)/(2*bs) if accumulate else 1)).backward()
        n += len(batch)
        got_loss,got_grads,state = learn.record.steps[i]
        assert got_loss==pytest.approx(1+float(loss.detach()), abs=1e-10)
        if not accumulate or n>=2*bs:
            for nm,p in plain.named_parameters(): torch.testing.assert_close(got_grads[nm], p.grad, rtol=0, atol=1e-10, msg=f'{nm} in batch {i}')
            with torch.no_grad():
                for p in plain.parameters(): p -= lr*p.grad; p.grad = None
            n,done = 0,done+1
        for nm,v in plain.state_dict().items(): torch.testing.assert_close(state[nm].double(), v.double(), rtol=0, atol=1e-10, msg=f'{nm} after batch {i}')
    assert done==(5 if accumulate else 12)

def test_model():
    "The papers' layers: no scale and shift at the end of the projector, and a predictor that is narrow in the middle"
    m = create_simsiam_model(small_encoder(), 8, 12, predictor_size=3)
    kinds = lambda o: [type(l).__name__ for l in o]
    assert kinds(m.projector)==['Linear','BatchNorm1d','ReLU']*2+['Linear','BatchNorm1d'] and kinds(m.predictor)==['Linear','BatchNorm1d','ReLU','Linear']
    assert m.projector[-1].weight is None and m.projector[-1].bias is None and m.predictor[0].out_features==3
    assert not any(isinstance(o, nn.BatchNorm1d) for o in create_simsiam_model(small_encoder(), 8, 12, bn=False).modules())

# The predictor's learning rate

class Rates(Callback):
    def before_fit(self): self.lrs = []
    def after_step(self): self.lrs.append([h['lr'] for h in self.opt.hypers])

def cycle(*args, cls=SimSiam, **kwargs):
    learn = Learner(tensor_dls(torch.rand(24,1,12,12), bs=4, device='cpu'), small_model(), cbs=[cls(corners(8,8), fix_predictor_lr=True), Rates()], **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
    return learn

@pytest.mark.parametrize('opt', [SGD, LARC])
def test_predictor_lr_never_falls(opt):
    "It rises with that of the others and stays; every parameter is in one group; and the next fit begins anew"
    learn = cycle(opt_func=opt)
    mine,others = map(list, zip(*learn.rates.lrs))
    assert mine==[max(others[:i+1]) for i in range(len(others))] and others[-1]<mine[-1]/10
    own,rest = learn.opt.param_lists
    assert {id(o) for o in own}=={id(o) for o in learn.model.predictor.parameters()} and len(own)+len(rest)==len(list(learn.model.parameters()))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
    assert learn.rates.lrs==[[1e-4,1e-4]]*6

def test_predictor_has_no_group():
    "Said before anything is trained; a splitter of one's own is left alone"
    with pytest.raises(ValueError, match='splitter=predictor_splitter'): cycle(splitter=lambda m: [trainable_params(m)])
    assert len(cycle(splitter=predictor_splitter).opt.param_lists)==2
    learn = Learner(tensor_dls(torch.rand(24,1,12,12), bs=4), small_model(), cbs=SimSiam(corners(8,8)))
    assert learn.splitter is trainable_params

def test_official_recipe():
    r = get_recipe('simsiam_100ep')
    cb = r.create_callback()
    kinds = {type(o).__name__: o for o in cb.aug_pipelines[0].fs}
    assert cb.fix_predictor_lr and (kinds['RandomJitter'].s, kinds['RandomJitter'].saturation, kinds['RandomCropResize'].scale, kinds['RandomGaussianBlur'].p)==(.5,1.,(.2,1.),.5)
    m = r.create_model(nn.Sequential(nn.Conv2d(3,2048,1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert [tuple(o.weight.shape) for o in [*m.projector, *m.predictor] if isinstance(o, nn.Linear)]==[(2048,2048)]*3+[(512,2048),(2048,512)]


# N processes

n_images,bs = 22,3
def pictures(): return torch.rand(n_images,1,12,12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
def joined(n):
    "The numbers of the images in the order in which one process, with batches of N·bs, meets the joined batches of N"
    ids = torch.arange(n_images)
    ids = torch.cat([ids, ids[:-n_images%n]]).chunk(n)
    return torch.cat([o for batches in zip(*(o.split(bs) for o in ids)) for o in batches]).tolist()

class Steps(Callback):
    order = 90
    def before_fit(self): self.steps = []
    def before_step(self): self.steps.append(dict(loss=self.learn.loss.detach(), **{k.removeprefix('module.'):p.grad.clone() for k,p in self.learn.model.named_parameters() if p.grad is not None}))

def fit(fixed, size, folder, order=None):
    torch.manual_seed(7)
    dls = tensor_dls(pictures(), pictures()[:5], bs=size, drop_last=False)
    dls.train.shuffle = False
    if order: dls.train.get_idxs = lambda: order
    learn = Learner(dls, small_model(False).double(), opt_func=SGD, path=folder, cbs=[SimSiam(corners(8,8,5), fix_predictor_lr=fixed), (r := Steps())])
    learn.remove_cbs([Recorder, ProgressCallback])
    with learn.distrib_ctx(): learn.fit_one_cycle(2, .1, wd=0.)
    return r.steps,{k:v.clone() for k,v in learn.model.state_dict().items()}

def fits(folder): return {o: fit(o, bs, folder) for o in (False,True)}

@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 3])
def test_ranks_equal_one_process(n, tmp_path):
    "Every loss, gradient and weight"
    many = on_ranks(fits, tmp_path, n)
    for o in (False,True):
        one = fit(o, bs*n, tmp_path, joined(n))
        for res in many: torch.testing.assert_close(res[o], one, rtol=1e-9, atol=1e-9)


# Health

class GradientThrough(SimSiam):
    "Broken: the projections that are predicted learn too"
    def lf(self, pred):
        z,p = (nn.functional.normalize(o.unflatten(0, (2,-1)), dim=2) for o in pred)
        return all_mean(-(p*z.flip(0)).sum(2).mean(), p.shape[1])

@lru_cache
def run(cls=SimSiam, predictor=True, end_bn=True, **kwargs):
    "A fit, perhaps without a part of the model"
    def _create(enc):
        model = create_simsiam_model(enc, 128, 128, predictor_size=32)
        if not end_bn: model.projector[-1] = nn.Identity()
        if not predictor: model.predictor = nn.Identity()
        return model
    return monitored(_create, cls(get_simsiam_aug_pipelines(20, resize_scale=(.4,1), jitter=False, bw=False, blur=False, stats=None)), **kwargs)

broken = pytest.mark.parametrize('broken', [dict(predictor=False), dict(cls=GradientThrough)], ids=['no predictor', 'gradient through targets'])
long   = dict(epochs=8, lr=1e-2)

@broken
def test_collapse_is_seen(broken):
    "All becomes one, if no batch norm at the end of the projector forbids it"
    m = run(end_bn=False, **broken, **long)
    assert 'looks like a collapse' in m.warning and m.history['std'][-1]<.2, m.history

@broken
def test_collapse_behind_a_batch_norm(broken):
    "The spread cannot tell; the projections fill half as many directions as those of the healthy run, and that is silent"
    m,whole = run(**broken, **long),run(**long)
    assert m.history['std'][-1]>.5 and m.history['rank'][-1]<.7*whole.history['rank'][-1]
    assert not whole.warning and whole.history['std'][-1]>.5
