"What a Learner may count on: state put back, half precision, saving, unlabelled data, and an answer to wrong use"
import random, re, warnings
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import permutations

import numpy as np, pytest, torch
from fastai.callback.core import (Callback, CancelBatchException, CancelBackwardException, CancelEpochException, CancelFitException,
                                  CancelStepException, CancelTrainException, CancelValidException)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find into Learner)
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.data.all import (Categorize, Datasets, DataBlock, DataLoaders, GrandparentSplitter, IntToFloatTensor, ToTensor,
                             get_image_files, parent_label)
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.core import PILImageBW, imagenet_stats
from fastai.vision.data import ImageBlock
from fastai.vision.models.xresnet import xresnet18
from fasttransform import Pipeline
from PIL import Image
from torch import nn

from self_supervised import core
from self_supervised.augmentations import *
from self_supervised.basics import warn_once
from self_supervised.data import image_dls, tensor_dls
from self_supervised.layers import *
from self_supervised.vision.simclr import *
from self_supervised.vision.swav import *

from methods import augs, callback, encoder, images, learner, loaders, methods, model, plain, quiet, without_labels

each_method = pytest.mark.parametrize('name', methods)

def swav_learner(K=12, n_protos=10, **kwargs):
    return learner('swav', m=model('swav', n_protos=n_protos), cb=SWAV(augs('swav'), [0,1], K=K, queue_start_pct=0.), **kwargs)

def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def next_random(learn): return random.random(), np.random.rand(), torch.rand(1).item(), learn.dls.train.rng.random()


# A fit ends

class Fail(Callback):
    "Raise `ex` in `event`"
    def __init__(self, event, ex, order): self.order = order; setattr(self, event, self.fail); self.ex = ex
    def fail(self): raise self.ex('on purpose')

cancels = [('before_fit',CancelFitException), ('before_epoch',CancelEpochException), ('before_train',CancelTrainException), ('before_validate',CancelValidException),
           ('before_batch',CancelBatchException), ('after_pred',CancelBatchException), ('after_loss',CancelBatchException), ('before_backward',CancelBackwardException),
           ('before_step',CancelStepException), ('after_batch',CancelFitException), ('after_pred',CancelFitException), ('after_pred',RuntimeError), ('before_batch',KeyboardInterrupt),
           *((o,RuntimeError) for o in 'before_fit before_epoch before_train before_batch after_loss before_backward after_backward before_step after_step '
                                       'after_batch after_train before_validate after_validate after_epoch after_fit'.split())]
few = [('before_fit',RuntimeError), ('before_batch',KeyboardInterrupt), ('after_pred',RuntimeError), ('after_pred',CancelBatchException), ('after_train',RuntimeError)]
# The base class answers all events, so that one method stands for all; the others have the few in which a method has something of its own
@pytest.mark.parametrize('name,event,ex,order', [(nm, *o, order) for nm in methods for o in (cancels if nm=='swav' else few) for order in (-5, 50) if nm=='swav' or order==50],
                         ids=lambda o: getattr(o, '__name__', str(o)))
def test_however_a_fit_ends_the_learner_is_its_own_again(name, event, ex, order):
    own = CrossEntropyLossFlat()
    learn = learner(name, loss_func=own)
    m,dls,cbs = learn.model,learn.dls,[o.name for o in learn.cbs]
    try: quiet(learn, 1, cbs=Fail(event, ex, order))
    except (Exception, KeyboardInterrupt): pass # fastai's Recorder has errors of its own when an epoch is cancelled early
    assert learn.loss_func is own and learn.model is m and learn.dls is dls and sorted(o.name for o in learn.cbs)==sorted(cbs)
    quiet(learn, 1) # and it can go on
    assert np.isfinite(learn.recorder.losses[-1]) and learn.loss_func is own

def test_the_queue_lives_on_in_a_second_fit():
    learn = swav_learner()
    quiet(learn, 1); feats = learn.model.queue.feats.clone()
    class Look(Callback):
        def before_batch(self): self.first = getattr(self, 'first', learn.model.queue.feats.clone())
    quiet(learn, 1, cbs=(look:=Look()))
    assert torch.equal(look.first, feats) # the queue of the first fit is there in the second

@each_method
def test_removing_the_callback_leaves_a_plain_learner(name):
    own = CrossEntropyLossFlat()
    x,y = images(),torch.arange(40)%3
    learn = learner(name, tensor_dls((x,y), (x,y), bs=8), loss_func=own)
    quiet(learn, 1)
    learn.remove_cb(methods[name].callback)
    learn.model = nn.Sequential(learn.model.encoder, nn.Linear(8,3))
    learn.dls.add_tfms([IntToFloatTensor()], 'after_batch')
    learn.create_opt(); quiet(learn, 1)
    assert np.isfinite(learn.recorder.losses[-1]) and not hasattr(learn, callback(name).name)

@each_method
@pytest.mark.parametrize('fitted', [False, True])
def test_lr_find_leaves_no_trace(name, fitted):
    learn = learner(name)
    if fitted: quiet(learn, 1)
    else: learn.create_opt()
    before,rng = state(learn),learn.dls.train.rng.getstate()
    opt,hypers = deepcopy(learn.opt.state_dict()),deepcopy(list(learn.opt.hypers))
    torch.manual_seed(3); random.seed(3); np.random.seed(3); expected = next_random(learn)
    torch.manual_seed(3); random.seed(3); np.random.seed(3); learn.dls.train.rng.setstate(rng)
    own = learn.loss_func
    with learn.no_bar(): learn.lr_find(num_it=12, show_plot=False)
    assert next_random(learn)==expected
    assert same(state(learn), before) and learn.loss_func is own
    assert list(learn.opt.hypers)==hypers
    for a,b in zip(opt['state'], learn.opt.state_dict()['state']):
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b[k])) for k,v in a.items())

@each_method
def test_validate_leaves_everything_as_it_is(name):
    learn = learner(name); quiet(learn, 1)
    before,own = state(learn),learn.loss_func
    with learn.no_bar(): loss = learn.validate()[0]
    assert np.isfinite(loss) and same(state(learn), before) and learn.loss_func is own
    fresh = learner(name) # a Learner that has not been fitted
    with fresh.no_bar(): assert np.isfinite(fresh.validate()[0])

def test_validation_in_a_fit_does_not_touch_the_queue():
    class Look(Callback):
        def before_validate(self): self.feats = self.learn.model.queue.feats.clone()
        def after_validate(self): assert torch.equal(self.feats, self.learn.model.queue.feats)
    quiet(swav_learner(cbs=[Look()]), 2)


# Views, batch and precision

class LookAtBatch(Callback):
    order = 20
    def before_batch(self): self.views,self.targets = self.xb,self.yb

@each_method
@pytest.mark.parametrize('labelled', [False, True])
def test_xb_and_yb(name, labelled):
    x,y = images(),torch.arange(40)%3
    dls = tensor_dls((x,y) if labelled else x, bs=8)
    learn = learner(name, dls, cbs=[(look:=LookAtBatch())])
    with nullcontext() if labelled else without_labels(name):
        quiet(learn, 1)
        assert len(look.views)==1 and [o.shape for o in look.views[0]]==[o(images(8)).shape for o in augs(name)]
        assert all(type(o) is torch.Tensor and o.dtype==torch.float32 and 0<=o.min() and o.max()<=1 for o in look.views[0])
        assert len(look.targets[0])==8 and (look.targets[0].ndim==1)==labelled

@each_method
def test_order_and_autocast(name):
    "Views are made before autocast begins, and the loss is computed outside it, in float32"
    seen,cls = {},methods[name].callback
    def tensor(pred): return pred[-1] if isinstance(pred, tuple) else pred
    class Autocast(Callback): # what MixedPrecision does on a GPU
        order = MixedPrecision.order
        def before_batch(self): self.ac = torch.autocast('cpu', torch.bfloat16); self.ac.__enter__()
        def after_loss(self): self.ac.__exit__(None, None, None)
    class Look(Callback):
        order = 30
        def before_fit(self): self.learn.model.encoder.register_forward_hook(lambda m,xs,out: seen.update(feats=out.dtype))
        def after_pred(self): seen['model'] = torch.is_autocast_enabled('cpu'),seen.pop('feats')
    def look(x): seen['views'] = torch.is_autocast_enabled('cpu'); return x
    assert cls.order < MixedPrecision.order
    cb = callback(name, [Pipeline([*o.fs, look], split_idx=0) for o in augs(name)])
    lf = cb.lf
    def spy(pred): seen['loss'] = torch.is_autocast_enabled('cpu'),tensor(pred).dtype; return lf(pred)
    cb.lf = spy
    learn = learner(name, cb=cb, cbs=[Autocast(), Look()]); quiet(learn, 1)
    assert seen=={'views':False, 'model':(True,torch.bfloat16), 'loss':(False,torch.float32)}
    assert all(o.dtype==torch.float32 for o in learn.model.buffers() if o.is_floating_point())

@pytest.mark.filterwarnings('ignore::UserWarning')
@each_method
@pytest.mark.parametrize('how', ['to_fp16', 'to_bf16'])
def test_mixed_precision_of_fastai(name, how):
    learn = getattr(learner(name), how)()
    quiet(learn, 1)
    assert np.isfinite(learn.recorder.losses[-1])

def test_gradient_accumulation():
    "Two batches of 8 accumulated move the weights by the mean of their gradients, as one step"
    x = images(16)
    steps = []
    class Count(Callback):
        def after_step(self): steps.append(self.train_iter)
    fixed = [Pipeline([partial(_half, i)], split_idx=0) for i in (0,1)]
    m = create_swav_model(encoder(bn=False), 8, 6, n_protos=10, bn=False)
    ref = deepcopy(m)
    learn = Learner(tensor_dls(x, bs=8), m, opt_func=SGD, cbs=[SWAV(fixed, [0,1], K=None, freeze_prototypes_niters=0), GradientAccumulation(16), Count()])
    learn.dls.train.shuffle = False
    quiet(learn, 1, lr=.1, wd=0.)
    assert steps==[1]
    opt = torch.optim.SGD(ref.parameters(), .1)
    cb = SWAV(fixed, [0,1], K=None); cb.learn = type('L', (), dict(model=ref, training=False))()
    for b in x.split(8): (cb.lf(ref([_half(i, b) for i in (0,1)]))/2).backward()
    opt.step(); normalize_prototypes(ref)
    for a,b in zip(m.parameters(), ref.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
def _half(i, x): return x[..., i*4:i*4+10].float()/255


# Saving

@each_method
def test_save_and_load(name, tmp_path):
    learn = learner(name, path=tmp_path); quiet(learn, 1)
    learn.save('run')
    other = learner(name, path=tmp_path).load('run')
    assert same(state(learn), state(other))
    quiet(other, 1)
    assert np.isfinite(other.recorder.losses[-1])

def test_save_and_load_with_a_queue(tmp_path):
    learn = swav_learner(path=tmp_path); quiet(learn, 1)
    assert learn.model.queue.full
    learn.save('run')
    other = swav_learner(path=tmp_path).load('run')
    class Look(Callback):
        def before_batch(self): self.feats = getattr(self, 'feats', self.learn.model.queue.feats.clone())
    quiet(other, 1, cbs=(look:=Look()))
    assert torch.equal(look.feats, learn.model.queue.feats)
    shorter = swav_learner(path=tmp_path, K=5).load('run'); quiet(shorter, 1) # another length may be chosen when going on
    assert shorter.model.queue.feats.shape==(2,5,8)

@each_method
def test_export(name, tmp_path):
    learn = learner(name, path=tmp_path); quiet(learn, 1)
    learn.export('whole.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        back = load_learner(tmp_path/'whole.pkl')
    x = images(4).float()/255
    learn.model.eval(); back.model.eval()
    assert torch.equal(learn.model(x), back.model(x))


# The examples of the older package, as in its public documentation, with a small local folder in place of the download

@pytest.fixture
def mnist_tiny(tmp_path):
    g = np.random.default_rng(0)
    for part in ('train','valid'):
        for label in ('3','7'):
            (tmp_path/part/label).mkdir(parents=True)
            for i in range(6): Image.fromarray(g.integers(0, 255, (28,28), dtype=np.uint8)).save(tmp_path/part/label/f'{i}.png')
    return tmp_path

def test_worked_example_of_swav(mnist_tiny):
    encoder = create_encoder("tf_efficientnet_b0_ns", n_in=3, pretrained=False, pool_type=PoolingType.CatAvgMax)
    model = create_swav_model(encoder, hidden_size=2048, projection_size=128, n_protos=3000)
    multi_view_inputs = ([torch.randn(2,3,224,224) for i in range(2)] +
                         [torch.randn(2,3,96,96) for i in range(4)])
    embedding, output = model(multi_view_inputs)
    norms = model.prototypes.weight.data.norm(dim=1)
    assert norms.shape[0] == 3000
    torch.testing.assert_close(norms, torch.ones(3000))
    assert embedding.shape==(12,128) and output.shape==(12,3000)

    items = get_image_files(mnist_tiny)
    tds = Datasets(items, [PILImageBW.create, [parent_label, Categorize()]], splits=GrandparentSplitter()(items))
    dls = tds.dataloaders(bs=4, after_item=[ToTensor(), IntToFloatTensor()], device='cpu')
    fastai_encoder = create_fastai_encoder(xresnet18, n_in=1, pretrained=False)
    model = create_swav_model(fastai_encoder, hidden_size=2048, projection_size=128)
    aug_pipelines = get_swav_aug_pipelines(num_crops=[2,6],
                                           crop_sizes=[28,16],
                                           min_scales=[0.25,0.05],
                                           max_scales=[1.0,0.3],
                                           rotate=False, jitter=False, bw=False, blur=False, stats=None,cuda=False)
    learn = Learner(dls, model,
                    cbs=[SWAV(aug_pipelines=aug_pipelines, crop_assgn_ids=[0,1], K=None), ShortEpochCallback(0.001)])
    b = dls.one_batch()
    learn._split(b)
    learn('before_batch')
    learn.pred = learn.model(*learn.xb)
    axes = learn.swav.show(n=4)
    assert len(axes)==4*8
    with learn.no_bar(): learn.fit(1)
    assert len(learn.recorder.losses)==1 and np.isfinite(learn.recorder.losses[0])

def test_worked_example_of_simclr(mnist_tiny):
    encoder = create_encoder("tf_efficientnet_b0_ns", n_in=3, pretrained=False, pool_type=PoolingType.CatAvgMax)
    model = create_simclr_model(encoder, hidden_size=2048, projection_size=128, nlayers=2)
    out = model(torch.randn((2,3,224,224)))
    assert out.shape==(2,128)

    items = get_image_files(mnist_tiny)
    tds = Datasets(items, [PILImageBW.create, [parent_label, Categorize()]], splits=GrandparentSplitter()(items))
    dls = tds.dataloaders(bs=5, after_item=[ToTensor(), IntToFloatTensor()], device='cpu')
    fastai_encoder = create_encoder('xresnet18', n_in=1, pretrained=False)
    model = create_simclr_model(fastai_encoder, hidden_size=2048, projection_size=128)
    aug_pipelines = get_simclr_aug_pipelines(size=28, rotate=False, jitter=False, bw=False, blur=False, stats=None, cuda=False)
    learn = Learner(dls, model, cbs=[SimCLR(aug_pipelines, temp=0.07, print_augs=True),ShortEpochCallback(0.001)])
    b = dls.one_batch()
    learn._split(b)
    learn('before_batch')
    axes = learn.sim_clr.show(n=5)
    assert len(axes)==5*2
    with learn.no_bar(): learn.fit(1)
    assert len(learn.recorder.losses)==1 and np.isfinite(learn.recorder.losses[0])


# Data without labels, without a loss, of other shapes

@each_method
def test_unlabelled_folder(name, tmp_path):
    for i in range(12): Image.fromarray(np.random.default_rng(i).integers(0, 255, (20+i,30,3), dtype=np.uint8)).save(tmp_path/f'{i}.jpg')
    learn = learner(name, image_dls(tmp_path, size=16, bs=4), model(name, 3))
    before = state(learn)
    with without_labels(name):
        quiet(learn, 1)
        assert np.isfinite(learn.recorder.losses[-1]) and not same(before, state(learn)) # fastai would have skipped the step

@each_method
def test_fastai_datablock_without_labels(name, tmp_path):
    for i in range(12): Image.fromarray(np.random.default_rng(i).integers(0, 255, (16,16,3), dtype=np.uint8)).save(tmp_path/f'{i}.png')
    dls = DataBlock((ImageBlock,), get_items=get_image_files).dataloaders(tmp_path, bs=4, num_workers=None if name=='swav' else 0)
    learn = learner(name, dls, model(name, 3), loss_func=nn.Identity())
    before = state(learn)
    with without_labels(name):
        quiet(learn, 1)
        assert np.isfinite(learn.recorder.losses[-1]) and not same(before, state(learn))

@each_method
def test_images_smaller_than_a_crop(name):
    learn = learner(name, loaders(name, images(size=9), bs=8)); quiet(learn, 1)
    assert np.isfinite(learn.recorder.losses[-1])

@each_method
def test_non_square_views_and_images(name):
    pipes = get_swav_aug_pipelines((2,1), ((12,8),(6,10)), **plain)
    x = torch.rand(16,4,14,20)
    learn = learner(name, loaders(name, x, bs=8), model(name, 4), callback(name, pipes)); quiet(learn, 1)
    assert np.isfinite(learn.recorder.losses[-1])


# Wrong use gets an answer

@pytest.mark.parametrize('kwargs,msg', [
    (dict(K=0),  'K=0 is the length of the queue.*None'), (dict(K=-3), 'K=-3'), (dict(K=2.5), 'K=2.5.*whole'), (dict(crop_assgn_ids=7), r'\[7\] must be'),
    (dict(crop_assgn_ids=[]), r'crop_assgn_ids=\[\].*from 0 to 3'), (dict(crop_assgn_ids=[0,0]), r'\[0, 0\] must be different'),
    (dict(crop_assgn_ids=[0,4]), r'\[0, 4\].*from 0 to 3'), (dict(crop_assgn_ids=[-1]), r'\[-1\]'),
    (dict(queue_start_pct=2), 'queue_start_pct=2.*from 0 to 1'), (dict(temp=0), 'temp=0'), (dict(eps=-1), 'eps=-1'), (dict(n_sinkh_iter=0), 'n_sinkh_iter=0')])
def test_wrong_arguments_of_swav(kwargs, msg):
    with pytest.raises(ValueError, match=msg): SWAV(**(dict(aug_pipelines=augs('swav'), crop_assgn_ids=[0,1]) | kwargs))

def test_wrong_arguments_of_simclr():
    with pytest.raises(ValueError, match='temp=0 must be positive'): SimCLR(augs('simclr'), temp=0)
    with pytest.raises(ValueError, match='nlayers=0'): create_simclr_model(encoder(), nlayers=0)

def test_generous_arguments():
    assert SWAV(augs('swav'), range(2)).crop_assgn_ids==[0,1]
    cb = SWAV(augs('swav'), 1, K=16.)
    assert cb.crop_assgn_ids==[1] and cb.K==16 and isinstance(cb.K, int)

@each_method
def test_wrong_pipelines(name):
    with pytest.raises(TypeError, match=r'aug_pipelines\[0\] is a function.*Pipeline'): callback(name, [images, images])
    with pytest.raises(TypeError, match='list of Pipelines'): callback(name, augs(name)[0])
    with pytest.raises(ValueError, match='split_idx=None.*split_idx=0'): callback(name, [Pipeline([images])]*2)
    if methods[name].callback.min_views==1: return
    with pytest.raises(ValueError, match='compares 2 views of an image or more, and aug_pipelines has only one: '): callback(name, augs(name)[:1])
    with pytest.raises(ValueError, match='empty'): callback(name, [])

@each_method
@pytest.mark.parametrize('make,msg', [
    (lambda nm: learner(nm, m=encoder()), 'the model is a Sequential, and .* trains a .*Model: make it with create_{}_model'),
    (lambda nm: learner(nm, m=model(nm, 3)), 'have 1 channels.*takes 3.*n_in=1'),
    (lambda nm: learner(nm, loaders(nm, images(8), bs=1)), 'bs=1.*batch norm.*bs=2'),
    (lambda nm: learner(nm, tensor_dls(images(), bs=8), metrics=accuracy), 'metrics accuracy.*this data has no labels.*Leave `metrics` out'),
    (lambda nm: learner(nm, loaders(nm, torch.full((16,1,14,14), float('nan')))), 'NaN'),
    (lambda nm: learner(nm, DataLoaders(_dl(torch.rand(16,14)), []), loss_func=nn.Identity()), r'shape \(B,C,H,W\)'),
    (lambda nm: learner(nm, cb=callback(nm, augs(nm, stats=imagenet_stats))), 'stats=None'),
    (lambda nm: learner(nm, DataLoaders(_dl(images(16), images(16), range(16)), []), loss_func=nn.Identity()), 'a batch has 2 inputs, and .* takes 1: .*n_inp=1'),
], ids='encoder channels batch-of-one metric nan shape stats two-inputs'.split())
def test_wrong_model_or_data(name, make, msg):
    if methods[name].callback.needs_labels and msg.startswith('metrics'): msg = 'learns from labels and this data has none'
    with pytest.raises(ValueError, match=f'(?s){msg.format(name)}'): quiet(make(name), 1)

@each_method
def test_too_few_images_for_a_batch_on_every_process(name, monkeypatch):
    dls = loaders(name, images(24), bs=16, drop_last=True)
    monkeypatch.setattr(core, 'num_distrib', lambda: 2)
    with pytest.raises(ValueError, match='24 training images on 2 process.*bs=16.*bs=12 or less, or drop_last=False'): quiet(learner(name, dls), 1)

@pytest.mark.parametrize('name,other', [(a, b) for a,b in permutations(methods, 2) if not issubclass(methods[b].model, methods[a].model)])
def test_the_model_of_another_method(name, other):
    says = f'the model is a {methods[other].model.__name__}, and {methods[name].callback.__name__} trains a {methods[name].model.__name__}: make it with create_{name}_model(encoder)'
    with pytest.raises(ValueError, match=re.escape(says)): quiet(learner(name, m=model(other)), 1)

def test_simclr_needs_other_images():
    with pytest.raises(ValueError, match='bs=1.*negatives'): quiet(learner('simclr', tensor_dls(images(8), bs=1), model('simclr', enc=encoder(bn=False))), 1)

def _dl(*xs):
    from fastai.data.load import DataLoader
    return DataLoader([*zip(*xs)], bs=8)

@each_method
def test_a_stem_that_makes_channels_of_pixels(name):
    "The first convolution takes four channels of one-channel images, and that is right"
    m = model(name, enc=nn.Sequential(nn.PixelUnshuffle(2), *encoder(4)), n_features=8)
    learn = learner(name, m=m); quiet(learn, 1)
    assert np.isfinite(learn.recorder.losses[-1]) and not any(o._forward_pre_hooks for o in m.modules())

@each_method
def test_nan_in_a_later_batch(name):
    x = torch.rand(40,1,14,14); x[-1] = float('nan')
    with pytest.raises(ValueError, match='NaN'): quiet(learner(name, loaders(name, x, bs=8)), 1)

def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=tmp_path.name): image_dls(tmp_path)

def notices(learn):
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always'); quiet(learn, 1)
    return [str(o.message) for o in w if o.category is UserWarning]

def test_far_more_prototypes_than_samples():
    said = notices(swav_learner(n_protos=1000, K=None))
    assert any('1000 prototypes for 8 samples' in o and 'n_protos=10' in o for o in said)
    assert not any('prototypes for' in o for o in notices(swav_learner(n_protos=20, K=None)))

def test_queue_longer_than_the_data():
    assert any('K=100' in o and '40 images' in o and 'K=20' in o for o in notices(swav_learner(K=100)))
    assert not any('the queue' in o for o in notices(swav_learner(K=30)))

@each_method
def test_images_outside_0_1(name):
    with pytest.raises(ValueError, match='67 %.*leave Normalize out'): quiet(learner(name, loaders(name, torch.randn(16,1,14,14, generator=torch.Generator().manual_seed(0)), bs=16)), 1)

@each_method
def test_launched_on_several_processes_without_distrib_ctx(name, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='(?s)2 processes were launched.*learn.distrib_ctx()'): quiet(learner(name), 1)

def test_notices_are_the_first_process_s(monkeypatch):
    monkeypatch.setenv('RANK', '1')
    assert notices(swav_learner(n_protos=1000, K=None))==[]
