import numpy as np, pytest, torch
from fastai.learner import Learner
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from self_supervised.data import fashion_mnist, tensor_dls
from self_supervised.evaluation import extract_features, knn, linear_probe, sample_per_class
from self_supervised.vision.swav import SWAV, create_swav_model, get_swav_aug_pipelines


@pytest.fixture(scope='module')
def pixels():
    (x,y),(xt,yt) = fashion_mnist()
    return (x[:600].flatten(1)/255, y[:600]), (xt[:300].flatten(1)/255, yt[:300])

def clusters(n=200, classes=4, noise=.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n)%classes
    return torch.eye(classes)[y]+noise*torch.randn(n, classes, generator=g), y


# Features

def encoder(): return nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def test_order_and_mode():
    "In the order of the dataset from a shuffled loader that drops its last batch; dropout off, batch norm untouched, modes put back"
    x,y = torch.randint(0, 256, (50,1,8,8), dtype=torch.uint8),torch.arange(50)
    dls,m = tensor_dls((x,y), bs=8),encoder()
    m[1].eval(); m[2].train()
    before = {k:v.clone() for k,v in m.state_dict().items()}
    feats,labels = extract_features(m, dls.train)
    assert torch.equal(labels, y) and not m[1].training and m[2].training and m.training
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    one_by_one = torch.stack([m.eval()(o[None].float()/255)[0] for o in x])
    torch.testing.assert_close(feats, one_by_one, rtol=1e-5, atol=1e-6)
    assert not feats.requires_grad and feats.dtype==torch.float32 and feats.device.type=='cpu'

def test_unlabelled_and_half():
    x = torch.rand(10,1,8,8)
    m = encoder().eval()
    feats,labels = extract_features(m.to(torch.bfloat16), tensor_dls(x, bs=4).train)
    assert labels is None and feats.dtype==torch.float32 and feats.shape==(10,4)

def test_a_learner_normalises_as_its_views_do():
    x = torch.rand(16,1,8,8)
    stats = ([.3],[.2])
    augs = get_swav_aug_pipelines((2,),(8,),(.5,),(1.,), jitter=False, bw=False, blur=False, stats=stats)
    learn = Learner(tensor_dls(x, bs=4), create_swav_model(encoder(), 8, 4, n_protos=5), cbs=SWAV(augs, [0,1], K=None))
    by_hand = learn.model.encoder.eval()((x-.3)/.2).detach()
    torch.testing.assert_close(extract_features(learn, learn.dls.train)[0], by_hand, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(extract_features(learn.model.encoder, learn.dls.train, stats=stats)[0], by_hand, rtol=1e-5, atol=1e-6)
    assert (extract_features(learn.model.encoder, learn.dls.train)[0]-by_hand).abs().max() > .01

def test_modes_are_put_back_after_an_error():
    m = encoder()
    with pytest.raises(RuntimeError): extract_features(m, [(torch.rand(2,3,8,8),)])
    assert m.training and m[2].training

def test_empty():
    with pytest.raises(ValueError, match='empty'): extract_features(encoder(), [])


# Nearest neighbours

def slow_knn(train, test, k, temp):
    "One query at a time, in plain Python"
    (x,y),(xt,yt) = ((a.double().numpy(),b.tolist()) for a,b in (train,test))
    n,hits = max(y+yt)+1,0
    for q,t in zip(xt, yt):
        sims = [float(q@o/np.linalg.norm(q)/np.linalg.norm(o)) for o in x]
        near = sorted(range(len(x)), key=lambda i: -sims[i])[:k]
        votes = [sum(np.exp(sims[i]/temp) for i in near if y[i]==c) for c in range(n)]
        hits += votes.index(max(votes))==t
    return hits/len(xt)

@pytest.mark.parametrize('k,temp', [(1,.07), (7,.07), (20,.5)])
def test_knn_equals_slow(pixels, k, temp):
    tr,te = tuple(o[:200] for o in pixels[0]),tuple(o[:60] for o in pixels[1])
    assert knn(tr, te, k=k, temp=temp)==pytest.approx(slow_knn(tr, te, k, temp), abs=1e-6)

def test_knn_equals_sklearn(pixels):
    "With a high temperature the votes are equal, which is scikit-learn's classifier on the unit sphere"
    (x,y),(xt,yt) = pixels
    want = KNeighborsClassifier(15, metric='cosine', weights=lambda d: np.exp((1-d)/.1)).fit(x, y).score(xt, yt)
    assert knn((x,y), (xt,yt), k=15, temp=.1)==pytest.approx(want, abs=1e-6)

def test_knn_chunks_and_scale(pixels):
    tr,te = pixels
    assert knn(tr, te, chunk=7)==knn(tr, te)==knn((tr[0]*100, tr[1]), (te[0]*.01, te[1]))

def test_knn_known_answer():
    assert knn(clusters(), clusters(40, seed=1), k=5)==1.
    x,y = clusters()
    assert knn((x,y), (x,(y+1)%4), k=5)==0.


# Linear probe

@pytest.mark.parametrize('C', [.01, 1.])
def test_linear_probe_equals_sklearn(pixels, C):
    (x,y),(xt,yt) = pixels
    mean,std = x.mean(0),x.std(0).clamp(min=1e-6)
    ref = LogisticRegression(C=C, max_iter=2000, tol=1e-6).fit(((x-mean)/std).double(), y)
    assert linear_probe((x,y), (xt,yt), C=C)==pytest.approx(ref.score(((xt-mean)/std).double(), yt), abs=1.01/len(yt)) # at most one image differs

def test_linear_probe_known_answer():
    assert linear_probe(clusters(), clusters(40, seed=1))==1.
    with torch.no_grad(): assert linear_probe(clusters(), clusters(40, seed=1))==1. # inside no_grad too
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(2000,5, generator=g),torch.randint(0, 2, (2000,), generator=g)
    assert abs(linear_probe((x[:1000],y[:1000]), (x[1000:],y[1000:]))-.5) < .06 # nothing to find


# Draws

def test_sample_per_class():
    x,y = torch.arange(100)[:,None],torch.arange(100)%5
    a,b,c = sample_per_class((x,y), 3),sample_per_class((x,y), 3),sample_per_class((x,y), 3, seed=1)
    assert a[1].bincount().tolist()==[3]*5 and torch.equal(y[a[0][:,0]], a[1]) and len(a[0].unique())==15
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], c[0])
    state = torch.get_rng_state(); sample_per_class((x,y), 3); assert torch.equal(state, torch.get_rng_state())

@pytest.mark.parametrize('f,msg', [
    (lambda d: knn(d, d, k=0), 'k=0'), (lambda d: knn(d, d, k=9), 'k=9 neighbours of 8'), (lambda d: knn((d[0],None), d), 'train has no labels'),
    (lambda d: linear_probe(d, (d[0],d[1][:-1])), 'test has 8 features and 7 labels'), (lambda d: sample_per_class(d, 3), 'n=3.*the smallest class has 2')])
def test_wrong_use(f, msg):
    with pytest.raises(ValueError, match=msg): f(clusters(8))
