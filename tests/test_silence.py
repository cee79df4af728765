"What would go wrong without a word: rows of other images, numbers that are none, fits that train nothing"
import warnings

import pytest, torch
import torch.utils.data as td
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders, TfmdDL
from fastai.interpret import Interpretation
from fastai.metrics import F1Score, accuracy
from fastai.torch_core import TensorImage
from fastai.callback.schedule import lr_find # noqa: F401 (patches Learner)
from fasttransform import Pipeline
from torch import nn

from self_supervised.augmentations import get_batch_augs
from self_supervised.basics import warn_once
from self_supervised.core import SSLCallback
from self_supervised.features import extract_features
from self_supervised.pipelines import make_views
from self_supervised.ranges import ImageDL, UnitFloat, check_range, raw_batches, set_raw, usable_images

from methods import callback, images, learner, methods, model, quiet

each_method = pytest.mark.parametrize('name', list(methods))

def said(f):
    "What `f` warns of"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always'); f()
    return [str(o.message) for o in w if o.category is UserWarning]

def labelled(n=24): return images(n),torch.arange(n)%3

# ---- A1: one prediction a view is not one an image

@pytest.mark.parametrize('call', [lambda l: l.get_preds(), lambda l: l.get_preds(ds_idx=0), lambda l: l.predict(l.dls.train_ds[0][0]), lambda l: l.show_results(),
                                  lambda l: Interpretation.from_learner(l).top_losses(1)], ids=['get_preds','of train','predict','show_results','Interpretation'])
@each_method
def test_no_predictions_of_views(name, call):
    from self_supervised.data import tensor_dls
    learn = learner(name, tensor_dls(labelled(), labelled(12), bs=8))
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=r'(?s)predictions an image, one a view.*extract_features\(learn, dl\)'): call(learn)
    learn.remove_cbs([o for o in learn.cbs if isinstance(o, SSLCallback)])
    learn.model = nn.Sequential(learn.model.encoder, nn.Linear(8, 3)) # what the message says
    with learn.no_bar(), learn.no_logging(): assert len(learn.get_preds()[0])==12

def test_features_are_in_order():
    from self_supervised.data import tensor_dls
    class Mean(nn.Module):
        def forward(self, x): return x.mean((2,3))
    x = torch.arange(32.)[:,None,None,None].expand(32,3,16,16).clone()/32
    assert (extract_features(Mean(), tensor_dls(x, x, bs=8).train)[0][:,0]*32).round().int().tolist()==list(range(32))

@pytest.mark.parametrize('metric', [accuracy, F1Score(average='macro')], ids=['accuracy','F1Score'])
def test_metrics_of_labels(metric):
    from self_supervised.data import tensor_dls
    dls = tensor_dls(labelled(), labelled(12), bs=8)
    with pytest.raises(ValueError, match='predicts 4 views of each.*OnlineKNN'): quiet(learner('swav', dls, metrics=metric), 1)
    quiet(learner('swav', dls, metrics=lambda pred,y: torch.tensor(float(len(y)))), 1) # one of your own may know what it gets

# ---- A6: nothing trained

class Images(td.Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.rand(1,14,14, generator=torch.Generator().manual_seed(i)),

def torch_dls(n, **kwargs): return DataLoaders(td.DataLoader(Images(n), **kwargs), [])

on_torch = pytest.mark.parametrize('name', [o for o in methods if not methods[o].callback.assigns_all]) # the others want loaders of fastai

@pytest.mark.parametrize('kwargs', [dict(batch_size=8, drop_last=True), dict(batch_sampler=td.BatchSampler(range(5), 8, True))], ids=['batch_size','batch_sampler'])
@on_torch
def test_fewer_images_than_a_batch(name, kwargs):
    with pytest.raises(ValueError, match='5 training images .* make no batch of bs=8.*bs=5'): quiet(learner(name, torch_dls(5, **kwargs), loss_func=nn.Identity()), 1)

@pytest.mark.parametrize('dls', [lambda: torch_dls(0, batch_size=8), lambda: torch_dls(16, batch_sampler=[])], ids=['no images','no batches'])
@on_torch
def test_no_batch(name, dls):
    with pytest.raises(ValueError, match='gives no batch'): quiet(learner(name, dls(), loss_func=nn.Identity()), 1)

def test_checks_see_loaders_of_pytorch():
    dls = torch_dls(40, batch_size=8)
    def notices(m, cb): return said(lambda: quiet(learner('swav', dls, m=m, cb=cb, loss_func=nn.Identity()), 1))
    assert any('1000 prototypes for 8 samples' in o for o in notices(model('swav', n_protos=1000), callback('swav', K=None)))
    assert any('K=100' in o and '40 images' in o for o in notices(model('swav'), callback('swav', K=100)))
    with pytest.raises(ValueError, match='bs=1'): quiet(learner('simclr', torch_dls(8, batch_size=1), loss_func=nn.Identity()), 1)

# ---- A7: what numbers images hold

x01 = torch.rand(8,3,16,16, generator=torch.Generator().manual_seed(0))
wrong = {'0…255': (x01*255, 'divide them by 255'), '0…3000': (x01*3000, '10000 for reflectances'), '0…65535': (x01*65535, '65535 for 16 bits'),
         'standardised': ((x01-.45)/.22, 'leave Normalize out'), '-1…1': (2*x01-1, r'\(x\+1\)/2'), 'CT': (x01*4000-1000, r'\(x-low\)/\(high-low\)'), 'float16': ((x01*255).half(), 'divide them by 255'),
         'int16': ((x01*4000).short(), r'x.float\(\)/4095'), 'uint16': ((x01*60000).to(torch.uint16), r'x.float\(\)/65535'), 'int32': ((x01*1000).int(), r'x.float\(\)/1023'),
         'int64 of bytes': ((x01*255).long(), r'x.to\(torch.uint8\)'), 'channels last': (x01.permute(0,2,3,1), r'x.permute\(0,3,1,2\)'), 'NaN': (x01/0, 'NaN or infinite'), 'complex': (x01+0j, 'complex')}

@pytest.mark.parametrize('kind', wrong)
def test_numbers_that_no_view_is_made_of(kind):
    "Refused, and never a crash inside: by the check itself, and in a fit"
    x,says = wrong[kind]
    with pytest.raises(ValueError, match=says): check_range(x)
    with pytest.raises(ValueError, match=says): make_views([Pipeline([lambda x: x], split_idx=0)], x)
    m = model('swav', n_in=16 if kind=='channels last' else 3)
    with pytest.raises(ValueError, match=says): quiet(learner('swav', DataLoaders(td.DataLoader(td.TensorDataset(x), 8), []), m=m, loss_func=nn.Identity()), 1)

@pytest.mark.parametrize('x', [x01, (x01*255).byte(), x01.half(), x01.double(), x01>.5, x01[:,:1], x01[:,:2]], ids=['float32','uint8','float16','float64','bool','grey','two channels'])
def test_numbers_that_views_are_made_of(x):
    "Without a word, and what is made of them are the same views as of their floats"
    assert not said(lambda: quiet(learner('swav', DataLoaders(td.DataLoader(td.TensorDataset(x), 8), []), m=model('swav', n_in=x.shape[1]), cb=callback('swav', K=None), loss_func=nn.Identity()), 1))
    want = x.float()/255 if x.dtype==torch.uint8 else x.double() if x.dtype==torch.float64 else x.float()
    got  = usable_images(x)
    torch.testing.assert_close(got.float()/255 if got.dtype==torch.uint8 else got, want, rtol=0, atol=0)

def test_a_few_pixels_outside():
    x = x01.clone(); x[0,0,:2] = 1.01
    assert [o for o in said(lambda: (warn_once.cache_clear(), check_range(x))) if 'are cut to that' in o]
    assert [o for o in said(lambda: (warn_once.cache_clear(), check_range(x01*.01))) if 'nearly black' in o]
    assert not said(lambda: check_range(torch.zeros(2,1,4,4)))

# ---- A12: bytes for methods, floats for everybody else

def byte_dl(n=8, **kwargs): return ImageDL([(TensorImage(o),) for o in images(n)], bs=4, **kwargs)

def test_bytes_for_methods_only():
    seen = []
    class Look(Callback):
        order = SSLCallback.order-1
        def before_batch(self): seen.append(self.x.dtype)
    dls   = DataLoaders(byte_dl(), byte_dl())
    learn = learner('swav', dls, cbs=Look(), loss_func=nn.Identity())
    quiet(learn, 1)
    assert set(seen)=={torch.uint8} and len(seen)==4
    assert all(b[0].dtype==torch.float32 for dl in dls for b in dl)

@pytest.mark.parametrize('event', ['before_batch','after_loss','after_batch'])
def test_however_a_fit_ends_the_next_epoch_is_for_everybody(event):
    dls = DataLoaders(byte_dl(), byte_dl())
    def stop(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): quiet(learner('swav', dls, cbs=type('Stop', (Callback,), {event:stop})(), loss_func=nn.Identity()), 1)
    assert all(b[0].dtype==torch.float32 for dl in dls for b in dl)

def test_loaders_of_another_class_are_for_everybody_again():
    dls = DataLoaders(*(TfmdDL([(TensorImage(o),) for o in images(8)], bs=4, after_batch=[UnitFloat()]) for _ in range(2)))
    quiet(learner('swav', dls, loss_func=nn.Identity()), 1)
    assert all(b[0].dtype==torch.float32 for dl in dls for b in dl)

def test_other_loaders_leave_the_request_alone():
    dl = byte_dl(); set_raw(dl)
    next(iter(dl.new(shuffle=True)))
    assert next(iter(dl))[0].dtype==torch.uint8 and next(iter(dl))[0].dtype==torch.float32
    with raw_batches(dl): pass
    assert next(iter(dl))[0].dtype==torch.float32

@pytest.mark.parametrize('name', [o for o in methods if methods[o].callback.assigns_all])
def test_memories_are_filled_from_bytes(name, monkeypatch):
    import self_supervised.memory as memory
    seen = []
    monkeypatch.setattr(memory, 'make_views', lambda augs,x: (seen.append(x.dtype), make_views(augs, x))[1])
    from self_supervised.data import tensor_dls
    quiet(learner(name, tensor_dls(images(), bs=8)), 1)
    assert set(seen)=={torch.uint8}

# ---- A11: a run of NaN is none

@each_method
def test_a_run_of_nan(name):
    class Nan(Callback):
        def after_batch(self):
            if self.train_iter==3: next(self.model.parameters()).data.fill_(float('nan'))
    learn = learner(name, cbs=Nan())
    with pytest.raises(FloatingPointError, match='(?s)diverged: the loss of step 4 is nan.*smaller learning rate'): quiet(learn, 1)

def test_weights_that_are_none_after_the_last_step():
    class Nan(Callback):
        def after_step(self):
            if self.iter+1==self.n_iter: next(self.model.parameters()).data[0].fill_(float('inf'))
    with pytest.raises(FloatingPointError, match='(?s)diverged: encoder.0.weight of the model'): quiet(learner('simclr', cbs=Nan()), 1)

def test_the_last_checkpoint_is_named():
    class Saves(Callback): last_saved = 'runs/step9.ckpt'
    with pytest.raises(FloatingPointError, match='last good checkpoint is runs/step9.ckpt'): quiet(learner('simclr', cbs=Saves()), 5, lr=1e30)

@pytest.mark.parametrize('kwargs', [dict(lr=float('nan')), dict(lr=float('inf')), dict(wd=float('nan'))], ids=str)
def test_settings_that_are_no_numbers(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))+'='): quiet(learner('simclr'), 1, **kwargs)

def test_lr_find_may_diverge():
    learn = learner('simclr')
    with learn.no_bar(), learn.no_logging(): learn.lr_find(start_lr=1., end_lr=1e38, num_it=30, stop_div=False, show_plot=False, suggest_funcs=())
    assert all(o.isfinite().all() for o in learn.model.state_dict().values())
    quiet(learn, 1)

# ---- A14

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@each_method
def test_mixed_images(name, mix):
    with pytest.raises(ValueError, match=f'{mix.__name__} mixes the images of a batch'): quiet(learner(name, cbs=mix()), 1)

def test_said_once_a_fit():
    def fit(): quiet(learner('swav', m=model('swav', n_protos=1000), cb=callback('swav', K=None)), 1)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('default') # as Python shows them: a second warning of the same place and text not at all
        for n in (1,2):
            fit()
            assert sum('1000 prototypes' in str(o.message) for o in w)==n

def test_views_larger_than_the_images():
    augs = [get_batch_augs(o, jitter=False, bw=False, blur=False, stats=None) for o in (32,32)]
    words = [o for o in said(lambda: quiet(learner('simclr', cb=methods['simclr'].callback(augs)), 1)) if 'blown up' in o]
    assert len(words)==1 and '14×14 pixels and views 32×32' in words[0] and 'size=36' in words[0]
    assert not any('blown up' in o for o in said(lambda: quiet(learner('simclr'), 1)))

@pytest.mark.parametrize('dtype', [torch.uint16,torch.int16,torch.int32,torch.int64], ids=str)
def test_steps_alone_divide_bytes_only(dtype):
    "12 bits are never divided by 255, nor is a crash left to PyTorch"
    from self_supervised.transforms import RandomCropResize, RandomFlip
    x = torch.full((2,3,4,4), 300).to(dtype)
    for step in (RandomCropResize(4), RandomFlip(.5)):
        with pytest.raises(ValueError, match=r'values up to 300.*x.float\(\)/1023'): step(x, split_idx=0)
    assert RandomFlip(0.)(torch.ones(2,3,4,4, dtype=torch.bool), split_idx=0).unique().tolist()==[1.]

# ---- an encoder that waits

@each_method
def test_the_encoder_waits(name):
    "Weights and statistics of the encoder stay in the first epoch, while the rest learns; then it learns too"
    from copy import deepcopy
    from self_supervised.heads import FreezeEncoder
    seen = []
    class Look(Callback):
        def before_fit(self): self.after_epoch()
        def after_epoch(self): seen.append(deepcopy(self.model.state_dict()))
    quiet(learner(name, cbs=[FreezeEncoder(1), Look()]), 2)
    def moved(a, b, encoder): return [k for k in a if a[k].is_floating_point() and k.startswith('encoder.')==encoder and not torch.equal(a[k], b[k])]
    assert moved(*seen[:2], True)==[] and moved(*seen[:2], False)
    assert {'encoder.0.weight','encoder.1.running_mean'} <= set(moved(*seen[1:], True))
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f'epochs={bad}'): FreezeEncoder(bad)
