"SupCon against the written-out definition, in float64: with labels for all images, for some, and for none"
import copy, math, warnings
from contextlib import nullcontext

import pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import FuncSplitter
from fastai.layers import ConvLayer
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from fastai.torch_core import TensorCategory, set_seed
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageBlock
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import test_dist
from methods import Record, augs, corners, images, model, quiet, small_encoder
from processes import on_ranks
from self_supervised.basics import block_rows
from self_supervised.data import fashion_mnist, tensor_dls
from self_supervised.diagnostics import CollapseMonitor
from self_supervised.dist import all_mean, rank, world_size
from self_supervised.recipes import get_recipe
from self_supervised.vision import supcon
from self_supervised.vision.simclr import nt_xent_loss
from self_supervised.vision.supcon import SupCon, UnsupMethod, create_supcon_model, get_supcon_aug_pipelines, supcon_loss

def rand(n, d=5, seed=0): return 3*torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

def slow(z, labels, temp, V, part=None):
    "Equation 2 of the paper, one pair at a time and with autograd's own gradient; anchors without a positive are none"
    B = len(z)//V
    z = [o/o.square().sum().sqrt() for o in z]
    y,on = [labels[i%B] for i in range(V*B)],[part is None or bool(part[i%B]) for i in range(V*B)]
    terms = []
    for i in range(V*B):
        others = [j for j in range(V*B) if j!=i and on[j]]
        pos = [j for j in others if y[j]==y[i]]
        if not on[i] or not pos: continue
        total = torch.stack([(z[i]*z[j]).sum()/temp for j in others]).exp().sum()
        terms.append(-sum(((z[i]*z[p]).sum()/temp).exp().div(total).log() for p in pos)/len(pos))
    return torch.stack(terms).mean() if terms else 0*sum(o.sum() for o in z)

def loss_and_grad(f, z, *args, **kwargs):
    z = z.clone().requires_grad_()
    loss = f(z, *args, **kwargs); loss.backward()
    return loss.detach(),z.grad

kinds = {'three classes': [0,1,0,2,1,0,0], 'one class': [4]*7, 'each its own': [3,1,0,2,-5,4,9], 'two and five': [0,0,1,1,1,1,1]}

@pytest.mark.parametrize('rows', [1, 5, 1000]) # of similarities at a time
@pytest.mark.parametrize('V', [1, 2, 5])
@pytest.mark.parametrize('labels', kinds)
def test_loss(labels, V, rows, monkeypatch):
    "Any number of positives, none too; some images that take no part"
    monkeypatch.setattr(supcon, 'block_rows', lambda *_: rows)
    z,y = rand(V*7),torch.tensor(kinds[labels])
    for part in (None, torch.tensor([1,1,0,1,0,1,1]).bool(), torch.tensor([0,0,0,0,0,0,1]).bool(), torch.zeros(7, dtype=torch.bool)):
        got = loss_and_grad(supcon_loss, z, y, .3, V, part)
        torch.testing.assert_close(got, loss_and_grad(slow, z, y.tolist(), .3, V, part), rtol=1e-10, atol=1e-12)
        assert part is None or not (got[1].view(V,7,-1)[:,~part]!=0).any()

def test_without_labels_it_is_simclr():
    z = rand(20)
    for y in (None, torch.arange(10)): torch.testing.assert_close(loss_and_grad(supcon_loss, z, y, .2), loss_and_grad(nt_xent_loss, z, .2), rtol=1e-10, atol=1e-12)

def test_gradient_of_a_multiple():
    "As under a gradient scaler; without gradient the same loss"
    z,y = rand(8),torch.tensor([0,0,1,2])
    torch.testing.assert_close(loss_and_grad(lambda z: 8*supcon_loss(z, y), z)[1], 8*loss_and_grad(supcon_loss, z, y)[1])
    with torch.no_grad(): a = supcon_loss(z, y)
    assert a==supcon_loss(z.requires_grad_(), y) and not a.requires_grad

@pytest.mark.parametrize('temp', [1e-3, .07, 100.])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_finite(temp, dtype):
    for z in (torch.randn(8,4), torch.ones(8,4), torch.zeros(8,4), 1e3*torch.randn(8,4), torch.eye(4).repeat(2,1)):
        for y in (None, torch.tensor([0,1,1,1])):
            for part in (None, torch.zeros(4, dtype=torch.bool)):
                loss,grad = loss_and_grad(supcon_loss, z.to(dtype), y, temp, part=part)
                assert loss.dtype==torch.float32 and loss.isfinite() and grad.isfinite().all()

def test_labels_of_any_whole_type():
    z,y = rand(8),torch.tensor([0,0,1,2])
    want = supcon_loss(z, y)
    for o in (y.byte(), y.int(), TensorCategory(y)): assert supcon_loss(z, o)==want
    with torch.autocast('cpu', torch.bfloat16): assert supcon_loss(z.float(), y)==supcon_loss(z.float(), y)
    with torch.autocast('cpu', torch.bfloat16): a = supcon_loss(z.float(), y)
    assert a==supcon_loss(z.float(), y)

def test_never_holds_all_similarities():
    "No tensor of the whole pass, forward and backward, is larger than a block"
    class Largest(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for o in out if isinstance(out, (tuple,list)) else [out]:
                if isinstance(o, torch.Tensor): self.n = max(self.n, o.numel())
            return out
    z,y = torch.randn(4096, 8),torch.arange(2048)%10
    with Largest() as largest: loss_and_grad(supcon_loss, z, y)
    assert largest.n <= block_rows(z, 1)

@pytest.mark.parametrize('args,kwargs,msg', [((5,None), {}, r'\(5, 5\).*n_views=2'), ((6,None), dict(n_views=4), 'n_views=4'), ((6,torch.zeros(6)), {}, r'labels has shape \(6,\), and there are 3 images'),
                                             ((6,torch.zeros(3,2)), {}, r'labels has shape \(3, 2\)'), ((6,None), dict(part=torch.ones(2)), r'part has shape \(2,\)'), ((4,None), dict(temp=0), 'temp=0 must be positive')])
def test_wrong_arguments(args, kwargs, msg):
    with pytest.raises(ValueError, match=msg): supcon_loss(rand(args[0]), args[1], **kwargs)


# Training

def both(pred, y, V, cb):
    "The loss of the callback, by the definition"
    known = y!=cb.unsup_class_id
    if cb.unsup_class_id is None: return cb.reg_lambda*slow(pred, y.tolist(), cb.temp, V)
    return slow(pred, list(range(len(y))), cb.temp, V, None if cb.unsup_method=='all' else ~known) + cb.reg_lambda*slow(pred, y.tolist(), cb.temp, V, known)

settings = {'labels': {}, 'all': dict(unsup_class_id=3, reg_lambda=.7), 'only': dict(unsup_class_id=3, unsup_method='only', reg_lambda=2.), 'both terms': dict(unsup_class_id=-1)}

@pytest.mark.parametrize('accumulate', [False, True])
@pytest.mark.parametrize('sizes', [(8,8), (8,8,5,5,5,5)], ids='2 2+4'.split())
@pytest.mark.parametrize('kind', settings)
def test_ten_steps(kind, sizes, accumulate):
    "Loss, every gradient and weight; batches without a label, with labels only, and a short last one; two batches a step"
    torch.manual_seed(0)
    x,bs,lr = torch.rand(22,1,12,12, dtype=torch.float64),4,.1
    y = torch.tensor([0,1,3,0, 3,3,3,3, 2,2,1,0, 3,0,3,0, 1,3,2,1, 3,1])
    m = create_supcon_model(small_encoder(), 8, 5).double()
    plain = copy.deepcopy(m)
    cb    = SupCon(corners(*sizes), temp=.2, **settings[kind])
    learn = Learner(tensor_dls((x,y), bs=bs, drop_last=False, shuffle=False, device='cpu'), m, opt_func=SGD, cbs=[cb, Record(), *([GradientAccumulation(2*bs)] if accumulate else [])])
    learn.remove_cbs([Recorder, ProgressCallback]) # fastai's Recorder cannot average losses in float64
    learn.fit(2, lr=lr, wd=0.)

    plain.train()
    n = steps = 0
    for i,(xb,yb) in enumerate(2*[*zip(x.split(bs), y.split(bs))]):
        views = [o(xb) for o in corners(*sizes)]
        feats = torch.cat([plain.encoder(torch.cat(o)) for o in (views[:2],views[2:]) if o]) # a batch norm sees all views of a size together
        loss  = both(plain.projector(feats), yb, len(views), cb)
        (loss*(len(xb)/(2*bs) if accumulate else 1)).backward()
        n += len(xb)
        got_loss,got_grads,state = learn.record.steps[i]
        assert got_loss==pytest.approx(float(loss.detach()), abs=1e-10)
        if not accumulate or n>=2*bs:
            for k,p in plain.named_parameters(): torch.testing.assert_close(got_grads[k], p.grad, rtol=0, atol=1e-9, msg=f'{k} in batch {i}')
            with torch.no_grad():
                for p in plain.parameters(): p -= lr*p.grad; p.grad = None
            n,steps = 0,steps+1
        for k,v in plain.state_dict().items(): torch.testing.assert_close(state[k].double(), v.double(), rtol=0, atol=1e-9, msg=f'{k} after batch {i}')
    assert steps==(5 if accumulate else 12) and len(learn.record.steps)==12

def test_arguments_of_the_older_package():
    "Their names, their order, their values"
    cb = SupCon(augs('supcon'), 0, UnsupMethod.Only, .5, .1, False)
    assert (cb.unsup_class_id, cb.unsup_method, cb.reg_lambda, cb.temp, cb.name)==(0, 'only', .5, .1, 'sup_con')
    m = create_supcon_model(small_encoder(), 256, 128, False, 2)
    assert [type(o).__name__ for o in m.projector]==['Linear','ReLU','Linear'] and m.projector[2].out_features==128

def test_views():
    a,b = get_supcon_aug_pipelines(28)
    assert a.fs[0].scale==b.fs[0].scale==(.08,1.) and a.fs[0].size==(28,28)

def test_features_of_unit_length():
    m,x = create_supcon_model(small_encoder(), unit_features=True, nlayers=1),torch.rand(4,24)
    torch.testing.assert_close(m.projector(x), m.projector[1](x/x.norm(dim=1, keepdim=True)))
    assert len(m.projector)==2 and m.projector[1].weight.shape==(128,24)

@pytest.mark.parametrize('kwargs,error,msg', [
    (dict(unsup_method='some'), ValueError, "unsup_method='some' must be 'all'.*or 'only'"), (dict(reg_lambda=-1.), ValueError, 'reg_lambda=-1.0 is the weight of the labels: it must be positive$'),
    (dict(reg_lambda=0), ValueError, 'must be positive$'), (dict(unsup_class_id=1, reg_lambda=-1), ValueError, 'or 0 for SimCLR alone'), (dict(reg_lambda=math.nan), ValueError, 'must be positive'),
    (dict(temp=0), ValueError, 'temp=0 must be positive'), (dict(unsup_class_id='unknown'), TypeError, r"unsup_class_id='unknown' must be a whole number.*list\(dls.vocab\).index\('unknown'\)"),
    (dict(unsup_class_id=True), TypeError, 'whole number')])
def test_wrong_settings(kwargs, error, msg):
    with pytest.raises(error, match=msg): SupCon(augs('supcon'), **kwargs)

def fit(dls, cb=None, **kwargs):
    learn = Learner(dls, model('supcon', **kwargs), loss_func=nn.Identity(), cbs=SupCon(augs('supcon')) if cb is None else cb)
    quiet(learn, 1)
    return learn

def of_block(block, get_y, tmp_path):
    for i,o in enumerate(images(16)): PILImageBW.create(o[0].numpy()).save(tmp_path/f'{i:02}.png')
    return DataBlock((ImageBlock(PILImageBW), block), get_items=lambda _: sorted(tmp_path.glob('*.png')), get_y=get_y, splitter=FuncSplitter(lambda f: int(f.stem)>11)).dataloaders(tmp_path, bs=4, num_workers=0)

def number(f): return int(f.stem)
def some(f): return ['a','b'][:1+number(f)%2]
def one(f): return 'ab'[number(f)%2]
def wide(f): return float(number(f))

@pytest.mark.parametrize('block,get_y,msg', [(MultiCategoryBlock, some, r'shape \(4, 2\) and type float32.*number the classes, or take a method without labels'),
                                             (RegressionBlock, wide, r'shape \(4,\) and type float32.*numbers to predict'), (CategoryBlock, one, None)], ids=['many','number','one'])
def test_labels_of_fastai(block, get_y, msg, tmp_path):
    "Classes train; several classes an image, and numbers, are refused before a step is done"
    dls = of_block(block, get_y, tmp_path)
    with nullcontext() if msg is None else pytest.raises(ValueError, match=f'(?s){msg}'): fit(dls)

@pytest.mark.parametrize('y', [torch.rand(16), torch.arange(16)[:,None], torch.zeros(16,3)], ids=['float','column','one-hot'])
def test_labels_that_are_none(y):
    dl = [(images(16)[i:i+4], y[i:i+4]) for i in range(0, 16, 4)]
    with pytest.raises(ValueError, match=r'(?s)labels have shape \(4.*one whole number an image'): fit(DataLoaders(tensor_dls((images(16),y), bs=4).train if y.ndim==1 else torch.utils.data.DataLoader(dl, batch_size=None), []))

def test_data_without_labels():
    learn = Learner(tensor_dls(images(), bs=8), model('supcon'), cbs=SupCon(augs('supcon')))
    with pytest.raises(ValueError, match='learns from labels and this data has none: .*label_func'): quiet(learn, 1)

def test_a_batch_of_one():
    with pytest.raises(ValueError, match='bs=1: the other images.*use 32 or more'): fit(tensor_dls((images(4),torch.zeros(4, dtype=torch.long)), bs=1), enc=nn.Sequential(nn.Conv2d(1,8,3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))

@pytest.mark.parametrize('kwargs', [dict(unsup_class_id=9), dict(unsup_class_id=9, unsup_method='only'), dict(unsup_class_id=0), dict(unsup_class_id=0, unsup_method='only')])
def test_all_known_or_none(kwargs):
    "A term that no image takes part in is nothing, and no NaN"
    learn = fit(tensor_dls((images(16),torch.zeros(16, dtype=torch.long)), bs=4), SupCon(augs('supcon'), **kwargs))
    assert all(torch.isfinite(o) for o in learn.recorder.losses) and all(p.isfinite().all() for p in learn.model.parameters())


# Several processes: one rank may have no image with a label, or one with a label only

sizes  = {2:[4,2], 3:[1,4,2]}
shared = {2:torch.tensor([0,1,0,3, 3,3]), 3:torch.tensor([1, 3,0,1,0, 3,1])} # 3: no label

def own(x, n, r): return x.split(sizes[n])[r]

def losses(f, views, y, known):
    "Each kind of call, and its gradient"
    for part in (None, known, ~known):
        for labels in (y, None):
            z = torch.cat(views).requires_grad_()
            loss = f(z, labels, .3, 3, part); loss.backward()
            yield loss.detach(),z.grad

def rank_losses(folder):
    n,r = world_size(),rank()
    y = own(shared[n], n, r)
    return list(losses(supcon_loss, [own(test_dist.data(sum(sizes[n]), seed=i), n, r) for i in (1,2,3)], y, y!=3))

@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 3])
def test_loss_on_ranks(n, tmp_path):
    "Loss and gradient of one process on the joined batch, of batches of unequal size"
    y = shared[n]
    def by_hand(z, labels, *args): return slow(z, (torch.arange(len(y)) if labels is None else labels).tolist(), *args)
    one = list(losses(by_hand, [test_dist.data(len(y), seed=i) for i in (1,2,3)], y, y!=3))
    for r,res in enumerate(on_ranks(rank_losses, tmp_path, n)):
        for (loss,grad),(loss1,grad1) in zip(res, one, strict=True):
            torch.testing.assert_close(loss, loss1, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(grad/n, torch.cat([own(o, n, r) for o in grad1.chunk(3)]), rtol=1e-9, atol=1e-12) # after DDP's average

def fits(folder, bs=test_dist.bs, order=None):
    res = {}
    for kind in ('all','only'):
        set_seed(7)
        x = test_dist.pictures()
        dls = tensor_dls((x,torch.arange(len(x))%4), bs=bs, drop_last=False, shuffle=False)
        if order: dls.train.get_idxs = lambda: order
        learn = Learner(dls, test_dist.no_bn_model('supcon').double(), opt_func=SGD, path=folder, cbs=[SupCon(corners(8,8,5), temp=.2, **settings[kind]), test_dist.Record()])
        learn.remove_cbs([Recorder, ProgressCallback])
        with learn.distrib_ctx(): learn.fit(2, lr=.05, wd=0.)
        res[kind] = test_dist.result(learn)
    return res

@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 3])
def test_fit_on_ranks(n, tmp_path):
    "Every loss, gradient and weight, with images without a label"
    one = fits(tmp_path, test_dist.bs*n, test_dist.joined(n))
    for res in on_ranks(fits, tmp_path, n): torch.testing.assert_close(res, one, rtol=1e-9, atol=1e-9)


# Health

class NoDenominator(SupCon):
    "Broken: images of a class are pulled together, and nothing pushes"
    def lf(self, pred):
        z,y = F.normalize(pred, dim=1),self.learn.yb[0].repeat(len(self.views))
        return all_mean(-(z@z.T)[y[:,None]==y].mean(), len(y))

def run(cls=SupCon, **kwargs):
    "What the monitor has seen of a fit on 1,024 images of Fashion-MNIST"
    torch.manual_seed(0)
    (x,y),_ = fashion_mnist()
    enc = nn.Sequential(ConvLayer(1,16,stride=2), ConvLayer(16,32,stride=2), ConvLayer(32,64,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    cb  = cls(get_supcon_aug_pipelines(20, resize_scale=(.4,1), jitter=False, bw=False, blur=False, stats=None), temp=.1, **kwargs)
    learn = Learner(tensor_dls((x[:1024],y[:1024]), bs=64, device='cpu', seed=0), create_supcon_model(enc, 128, 32, bn=True), cbs=[cb, CollapseMonitor(every=4, warmup=10)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet(learn, 4, 3e-3)
    return learn.collapse_monitor

def test_collapse_is_seen():
    broken = run(NoDenominator)
    assert 'looks like a collapse' in broken.warning and 'NoDenominator(temp=0.2), now 0.1' in broken.warning
    assert broken.history['std'][-1]<.1

@pytest.mark.parametrize('kwargs', [{}, dict(unsup_class_id=0), dict(unsup_class_id=0, unsup_method='only')], ids=['ten','all','only'])
def test_no_false_alarm(kwargs):
    m = run(**kwargs)
    assert not m.warning and m.history['std'][-1]>.1
    assert ('loss-chance' in m.history)==('unsup_class_id' not in kwargs)
    if not kwargs: assert m.history['loss-chance'][-1]<-.5

def test_two_classes_are_two_points():
    "Which fill two directions at most, and in the end one: for all other methods a sign of a collapse"
    torch.manual_seed(0)
    y = torch.arange(256)%2
    learn = Learner(tensor_dls((y[:,None,None,None].float().expand(-1,1,14,14).contiguous(),y), bs=16, device='cpu', seed=0), model('supcon', bn=True), cbs=[SupCon(augs('supcon')), CollapseMonitor(every=2, warmup=0)])
    quiet(learn, 2, 1e-2)
    m = learn.collapse_monitor
    assert len(m.history['rank'])==16 and max(m.history['rank'])<2.1 and min(m.history['std'][2:])>.1 and not m.warning

def test_chance():
    "The loss of one projection for all, of the images of all batches alike"
    class Same(SupCon):
        def lf(self, pred): return super().lf(torch.ones_like(pred)+0*pred)
    for lam in (1., .3):
        learn = fit(tensor_dls((images(16),torch.arange(16)%3), bs=8), Same(augs('supcon'), reg_lambda=lam))
        assert learn.same.chance==pytest.approx(float(learn.recorder.losses[-1]), rel=1e-5)==pytest.approx(lam*math.log(15), rel=1e-5)
    assert SupCon(augs('supcon'), 0).chance is None


# Recipes

def test_official_recipes():
    "The numbers of the scripts: learning rates for a batch of 256, and a loss that is multiplied"
    a,b = get_recipe('supcon_350ep'),get_recipe('supcon_cifar10')
    assert (a.bs, a.epochs, a.lr, a.wd, a.opt, a.args['temp'], a.args['reg_lambda'])==(6144, 350, pytest.approx(.4*6144/256), 1e-3, 'lars', .1, .1)
    assert (b.bs, b.epochs, b.lr, b.wd, b.opt, b.args['temp'], b.args['reg_lambda'], b.lr_final)==(1024, 1000, .5, 1e-4, 'sgd', .1, pytest.approx(.1/.07), pytest.approx(.5*.1**3))
    m = a.create_model(nn.Sequential(nn.Conv2d(3,8,3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert len(m.projector)==2 and m.projector[1].weight.shape==(128,8)

def test_small_recipe():
    "Runs, and with labels that are missing"
    x,y = torch.randint(0, 256, (256,1,28,28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),torch.arange(256)%4
    r = get_recipe('supcon_small', epochs=1, warmup_epochs=0., unsup_class_id=3, unsup_method='only', reg_lambda=.5)
    learn = r.learner(tensor_dls((x,y), bs=128), small_encoder())
    with learn.no_bar(), learn.no_logging(): r.fit(learn)
    assert (learn.sup_con.unsup_class_id, learn.sup_con.unsup_method, learn.sup_con.reg_lambda)==(3, 'only', .5) and len(learn.recorder.losses)==2
