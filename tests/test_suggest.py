"Recipes for few images: floors, and nothing that the checks of a fit then warn of"
import warnings

import pytest
from fastprogress import fastprogress

import methods
from self_supervised import suggest # noqa: F401 (gives recipes `suggest`)
from self_supervised.basics import warn_once
from self_supervised.data import tensor_dls
from self_supervised.recipes import get_recipe

@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    warn_once.cache_clear()
    monkeypatch.setattr(fastprogress, 'NO_BAR', True)

small = 'swav_small','simclr_small','deepcluster_small','sela_small','swav_200ep_bs256','deepclusterv2_400ep','simclr_v1_100ep'

@pytest.mark.filterwarnings('ignore:.*images are few')
@pytest.mark.parametrize('name', small)
def test_floors(name):
    old = get_recipe(name)
    for n in (4, 5, 31, 32, 64, 100, 639, 640, 1000, 5000):
        r = old.suggest(n, 28)
        K,protos = r.args.get('K') or 0,r.args.get('n_protos', 0)
        assert r.bs<=n and K<=n, 'no full batch'
        assert r.bs>=min(old.bs, 32, n/2) and r.bs<=old.bs, 'hardly an image beside an image'
        assert protos<=4*(r.bs+K) or 'deepcluster' in name or 'sela' in name, 'codes would be noise'

@pytest.mark.parametrize('n,gpus,bs', [(64,1,32), (64,2,32), (64,8,32), (16,8,16), (40,1,32), (20,1,16), (2,1,2), (1280,1,64), (100_000,1,128)])
@pytest.mark.filterwarnings('ignore:.*images are few')
def test_batch(n, gpus, bs): assert get_recipe('swav_small').suggest(n, 28, gpus=gpus).bs==bs

def test_a_batch_that_somebody_chose_is_not_raised():
    assert get_recipe('swav_small', bs=8).suggest(600, 28).bs==8

def test_too_few_for_a_batch():
    for n,gpus in ((0,1), (1,1), (7,4)):
        with pytest.raises(ValueError, match=f'n_images={n}: a batch needs at least two images for each of gpus={gpus}'): get_recipe('swav_small').suggest(n, 28, gpus=gpus)

def test_few_images_are_told():
    with pytest.warns(UserWarning, match='100 images are few: .*hardly beat an untrained one.*labels are not needed'): get_recipe('simclr_small').suggest(100, 28)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        get_recipe('simclr_small').suggest(500, 28)

@pytest.mark.parametrize('name', ['swav_small','simclr_small','deepcluster_small','sela_small'])
def test_what_is_suggested_fits_without_a_warning(name):
    with pytest.warns(UserWarning, match='64 images are few'): r = get_recipe(name, epochs=1).suggest(64, 14)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn = r.learner(tensor_dls(methods.images(64, 3), bs=r.bs, device='cpu'), methods.encoder(3))
        with learn.no_bar(), learn.no_logging(): r.fit(learn)
    assert len(learn.recorder.lrs)==2
