"SeLa-v2: whole fits against dense loops, prototypes that learn, and what it says when labels are not balanced"
import warnings

import pytest, torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn

import methods, reference
from self_supervised.basics import warn_once
from self_supervised.data import tensor_dls
from self_supervised.vision.deepcluster import create_deepcluster_model, deepcluster_loss
from self_supervised.vision.sela import SeLa, create_sela_model, sela_loss

from test_deepcluster import Stop, bn_free, check_resume, setups, stepwise
from test_swav import images, quiet, views_2

def learner(cb=None, cbs=(), **kwargs):
    return Learner(tensor_dls(images(), images(6), bs=6), bn_free(create_sela_model, **kwargs), lr=.1, cbs=[SeLa(views_2) if cb is None else cb, *cbs])

@setups
def test_fit_equals_definition(augs, ids, heads, drop, every):
    "Memory, labels, loss and gradients of three epochs: the balanced labels of all images for the prototypes of that moment"
    def assign(cb, h, z, head):
        assert (head.square().sum(1).sqrt()-1).abs().max()<1e-9
        assert cb.residuals[h]<=1e-7
        return reference.balanced_labels((z@head.T).tolist(), .06, 300).tolist()
    learn = stepwise(SeLa(augs, ids, temp=.2, eps=.06, tol=1e-7, n_sinkh_iter=2000, assign_every=every, freeze_prototypes_niters=2),
                     bn_free(create_sela_model, n_heads=heads), assign, every=every, drop_last=drop)
    start = learn.model.prototypes.weight.detach().clone()
    quiet(learn, 3)
    n = 3 if drop else 4
    assert learn.check_step.n_checked==3*(n+1) and learn.check_step.assigned==[n*o for o in range(0, 3, every)]
    assert not torch.equal(learn.model.prototypes.weight, start) and len(learn.sela.residuals)==heads

@pytest.mark.parametrize('n,first_moved', [(3,3), (0,0), (None,1)]) # None: 1% of 6 steps, so the first one
def test_prototypes_are_fixed_first(n, first_moved):
    seen = []
    class Look(Callback):
        order = 20
        def after_step(self): seen.append(self.learn.model.prototypes.weight.detach().clone())
    learn = learner(SeLa(views_2, freeze_prototypes_niters=n), [Look()])
    start = learn.model.prototypes.weight.detach().clone()
    quiet(learn, 2, wd=.1)
    assert [torch.equal(start, o) for o in seen]==[i<first_moved for i in range(6)]
    assert all((o.norm(dim=1)-1).abs().max()<1e-5 for o in seen)

def test_resume(tmp_path):
    "In the middle of an epoch, with prototypes that are fixed until after the resume, what is saved in a step is the whole state"
    cb = lambda: methods.callback('sela', methods.augs('sela'), freeze_prototypes_niters=9)
    learn,seen = check_resume(tmp_path, 'sela', 3, None, 8, cb=cb)
    assert len(seen)==9 and learn.sela.steps_done==15 and set(learn.sela.residuals)=={0,1,2}
    for x,ids in seen: assert torch.equal(x, methods.images()[ids])

def test_prototypes_of_any_length_are_normalised_before_use():
    for run in (lambda learn: learn.validate(), lambda learn: quiet(learn, 1, 0., wd=0.)):
        learn = learner()
        with torch.no_grad(): learn.model.prototypes.weight.mul_(3)
        with learn.no_bar(): run(learn)
        torch.testing.assert_close(learn.model.prototypes.weight.norm(dim=1), torch.ones(12))

def test_model_and_loss():
    model = bn_free(create_sela_model, n_protos=7, n_heads=2)
    assert model.prototypes.weight.requires_grad and model.heads.shape==(2,7,5) and not model.heads.requires_grad
    assert not create_deepcluster_model(methods.encoder(), 8, 5, n_protos=7).prototypes.weight.requires_grad
    assert sela_loss is deepcluster_loss

def test_not_balanced_in_time():
    "Is said, once, and what to change; balanced labels are not worth a word"
    def told(**kwargs):
        warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            quiet(learn := learner(SeLa(views_2, **kwargs)), 2)
        return learn,[str(o.message) for o in w if 'share' in str(o.message)]
    learn,said = told(eps=.3, tol=1e-9, n_sinkh_iter=1)
    assert 1e-9<learn.sela.residuals[0]<.5
    assert said==['after 1 rounds a prototype is still further from its share of the images than tol=1e-09: raise n_sinkh_iter, tol, or eps (now 0.3)']
    learn,said = told()
    assert learn.sela.residuals[0]<=.01 and said==[]

@pytest.mark.parametrize('kwargs,msg', [
    (dict(eps=0), 'eps=0 and tol=0.01 must be positive: 0.01 is usual for both'), (dict(tol=0), 'eps=0.01 and tol=0 must be positive'),
    (dict(n_sinkh_iter=0), 'n_sinkh_iter=0 must be 1 or more: 1000 is usual'), (dict(temp=-1), 'temp=-1 must be positive'), (dict(assign_every=0), 'assign_every=0 must be 1 or more'),
    (dict(crop_assgn_ids=[2]), r'crop_assgn_ids=\[2\]'), (dict(aug_pipelines=views_2[:1]), 'has only one: give more pipelines')])
def test_wrong_arguments(kwargs, msg):
    with pytest.raises(ValueError, match=msg): SeLa(**{'aug_pipelines':views_2, **kwargs})

@pytest.mark.parametrize('model,msg', [
    (lambda: nn.Linear(1,1), r'the model is a Linear, and SeLa trains a SeLaModel: make it with create_sela_model\(encoder\)'),
    (lambda: bn_free(), 'the model is a DeepClusterModel, and SeLa trains a SeLaModel'),
    (lambda: bn_free(create_sela_model, n_protos=23), '23 clusters of 22 images: create the model with n_protos=2 or fewer')])
def test_wrong_models(model, msg):
    with pytest.raises(ValueError, match=msg): quiet(Learner(tensor_dls(images(), bs=6), model(), cbs=[SeLa(views_2), Stop()]), 1)
