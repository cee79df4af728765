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

# What a batch takes

photos = [(375,500), (500,375), (1200,1600), (200,300), (100,4000), (512,512)]

def test_bytes_of_images():
    r = get_recipe('swav_200ep')
    for kw,want in ((dict(), [375*500, 500*375, 512*683, 200*300, 100*300, 512*512]), (dict(short_side=150), [150*200, 200*150, 150*200, 150*225, 100*300, 150*150]), (dict(max_aspect=1.), [375*375, 375*375, 512*512, 200*200, 100*100, 512*512])):
        pixels,views = r.image_bytes(photos, **kw)
        assert pixels.tolist()==[3*o for o in want] and views==4*3*(2*224*224+6*96*96)
        assert r.image_bytes(photos, n_in=5, **kw)[0].tolist()==[5*o for o in want]

def said(f, capsys):
    f()
    return capsys.readouterr().out.splitlines()

def test_what_a_batch_takes_is_said(capsys):
    pixels,views = [3*o for o in (100*300, 200*300, 375*500, 375*500, 512*512, 512*683)],4*3*(2*224*224+6*96*96)
    for gpus in (1,4):
        *_,line,small = said(lambda: get_recipe('swav_200ep').suggest(1_000_000, photos, gpus=gpus), capsys)
        typical,largest,n = pixels[2],pixels[-1],4096//gpus
        assert line==(f'An image takes {typical/1e6:.3g} MB of pixels (the largest of 6: {largest/1e6:.3g} MB) and {views/1e6:.3g} MB of views: '
                      f'{n} of them make a batch of {n*(typical+views)/1e6:.3g} MB, or of {n*(largest+views)/1e6:.3g} MB if all are as large as that.')
        assert small.startswith('2 of 6 images have a shorter side of fewer pixels than the largest crop')
    assert not [o for o in said(lambda: get_recipe('swav_200ep').suggest(1_000_000, 375), capsys) if 'An image takes' in o]

def test_the_batch_counts_for_the_memory(capsys):
    "At a hundredth of a GB nothing fits, and the message says what an image takes"
    r,views = get_recipe('swav_200ep'),4*3*(2*224*224+6*96*96)
    def takes(size):
        with pytest.raises(ValueError) as e: r.suggest(1_000_000, size, memory=.01)
        return float(str(e.value).split('one image takes ')[1].split()[0])
    activations = r.activation_bytes()/2
    assert takes(500)==round(activations/1e9, 2) and takes([(5000,15000)]*2+[(300,300)])==round((activations+3*512*1536+views)/1e9, 2)

@pytest.mark.parametrize('size', [(375,500), [], [375], [(1,2,3)]], ids=str)
def test_wrong_sizes(size):
    with pytest.raises(ValueError, match='must be pixels of the shorter side, or a list of'): get_recipe('swav_small').suggest(1000, size)
