"Labels as people have them: few, uneven, several an image, targets of a regression, raw ids; every number against scikit-learn's"
import warnings

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import Datasets
from fastai.data.transforms import MultiCategorize, OneHotEncode
from fastai.learner import Learner
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, balanced_accuracy_score, r2_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from self_supervised.basics import warn_once
from self_supervised.data import tensor_dls
from self_supervised.evaluation import Result, compare, evaluate, fine_tune, knn, linear_probe, sample_per_class, sgd_probe
from self_supervised.probes import check_labels, label_kind, labelled_features, number_classes, ready_labels, renumber
from self_supervised.results import average_precision, r_squared, result_of, result_of_columns, top_hits

def rng(seed=0): return torch.Generator().manual_seed(seed)

def features(y, n=6, noise=.7, seed=0):
    "What can be read from a mixture of the columns of `y`"
    y = (nn.functional.one_hot(y) if y.ndim==1 else y).float()
    return y@torch.randn(y.shape[1], n, generator=rng(7)) + noise*torch.randn(len(y), n, generator=rng(seed))

def classes(*ns, seed=0): return torch.cat([torch.full((n,), i) for i,n in enumerate(ns)])[torch.randperm(sum(ns), generator=rng(seed))]

def halves(x, y): return (x[::2],y[::2]),(x[1::2],y[1::2])

def has(n=240, c=5, seed=0): return (torch.rand(n, c, generator=rng(seed))<torch.linspace(.1, .6, c)).long()

def said(f):
    "What `f` gives and warns of"
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always'); res = f()
    return res,[str(o.message) for o in w if o.category is UserWarning]

def sklearn_linear(x, y, C=1.): return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000, tol=1e-7)).fit(x.double(), y)
def cosine(k, temp=.07): return KNeighborsClassifier(k, metric='cosine', weights=lambda d: np.exp((1-d)/temp))

class Never(nn.Module):
    "An encoder that must not be reached"
    def forward(self, x): raise AssertionError('images were read before the answer was known')


# Uneven classes

def test_balanced_accuracy_is_scikit_learns():
    "Of k-NN and of linear classifiers, and the mean over draws"
    y  = classes(300, 60, 20)
    (x,y),(xt,yt) = train,test = halves(features(y, noise=1.5), y)
    p = cosine(20).fit(x, y).predict(xt)
    r = knn(train, test)
    assert (r.accuracy,r.balanced)==pytest.approx((np.mean(p==yt.numpy()), balanced_accuracy_score(yt, p))) and r.largest==pytest.approx((yt==0).float().mean().item())
    p = sklearn_linear(x, y).predict(xt.double())
    r = linear_probe(train, test)
    assert r.balanced==pytest.approx(balanced_accuracy_score(yt, p), abs=.05) and r.balanced<r.accuracy
    r    = linear_probe(train, test, n_per_class=5, seeds=2, C=.1)
    want = [balanced_accuracy_score(yt, sklearn_linear(*sample_per_class(train, 5, seed=i), C=.1).predict(xt.double())) for i in range(2)]
    assert r.balanced==pytest.approx(np.mean(want), abs=.02)

def test_balanced_accuracy_by_hand():
    y    = torch.tensor([0]*6+[1]*2+[3])
    hits = [top_hits(nn.functional.one_hot(p, 4).float(), y) for p in (torch.zeros(9).long(), torch.tensor([0,0,0,1,1,1,1,0,3]))]
    r    = result_of('p', hits, y, 4)
    assert r.balanced==pytest.approx(((1+0+0)/3 + (1/2+1/2+1)/3)/2) and r.largest==pytest.approx(6/9)

@pytest.mark.parametrize('ns,shown', [((50,50), False), ((60,40), False), ((60,30), True), ((95,5), True), ((30,30,30,15), True), ((30,29,28), False)])
def test_shown_where_classes_are_uneven(ns, shown):
    "From a ratio of two on"
    y = classes(*ns)
    r = knn((features(y),y), (features(y, seed=1),y), k=3)
    assert ('balanced' in str(r))==('balanced' in r.cell)==('largest class' in r.row())==(r.balanced is not None)==(r.largest is not None)==shown

def test_features_that_say_nothing():
    "95 % by always saying the same: the words tell"
    y = torch.tensor([0]*95+[1]*5)
    x = torch.randn(100, 4, generator=rng())
    r = linear_probe((x,y), (x,y), C=1e-6)
    assert str(r).startswith('linear, all labels: 95.0 %, balanced 50.0 %, largest class 95.0 % (') and r.row().startswith('| linear, all labels | 95.0 (balanced 50.0), largest class 95.0 |  | C=')

def test_uneven_in_a_table():
    a,b = Result('p', [.9,.8], balanced=.5, largest=.75),Result('p', [.7])
    assert str(compare(dict(a=a, b=b))).splitlines()==['| accuracy in % (largest class 75.0) / accuracy in % | p                          |', '|----------------------------------------------------|----------------------------|',
                                                       '| a                                                  | 85.0 ± 7.1 (balanced 50.0) |', '| b                                                  | 70.0                       |']

def test_fewer_labels_than_asked_for():
    "A class gives all it has, with one notice; the name says so"
    y = classes(300, 60, 5)
    train,test = (features(y),y),(features(y, seed=1),y)
    r,words = said(lambda: linear_probe(train, test, n_per_class=10, seeds=3))
    assert r.protocol=='linear, up to 10 labels a class' and r.settings['train']==25 and len(r.runs)==3
    assert words==['1 of 3 classes have fewer than 10 images, the smallest 5: all of these are taken']
    (x,t),_ = said(lambda: sample_per_class((torch.arange(365), y), 10))
    assert t.bincount().tolist()==[10,10,5] and len(x.unique())==25 and torch.equal(y[x], t)
    for n in (301, 400):
        with pytest.raises(ValueError, match=f'n={n} labels of each class, but the largest class has 300'): linear_probe(train, test, n_per_class=n)
    assert linear_probe(train, test, n_per_class=5).protocol=='linear, 5 labels a class'

def uneven_dls(*ns, bs=16): y = classes(*ns); x = torch.rand(len(y),1,8,8, generator=rng()) ; return tensor_dls((x,y), (x[::2],y[::2]), bs=bs)

def test_evaluate_uneven():
    res,words = said(lambda: evaluate(nn.Flatten(), uneven_dls(60, 20, 5), seeds=2))
    assert [o.protocol for o in res]==['k-NN(20)','linear, up to 10 labels a class','linear, all labels'] and all(o.balanced for o in res) and len(words)==1
    table = compare({'a':nn.Flatten(), 'b':nn.Flatten()}, uneven_dls(60, 20, 5), seeds=2)
    assert list(table['a'])==list(table['b'])==[o.protocol for o in res] and 'largest class' in str(table)

@pytest.mark.parametrize('ns', [(6,5,3), (2,2), (1,1)])
def test_evaluate_very_few(ns):
    "Fewer than ten of each class, fewer than twenty images: no crash, the question that would ask the same twice is left out"
    res,words = said(lambda: evaluate(nn.Flatten(), uneven_dls(*ns, bs=2)))
    assert [o.protocol for o in res]==[f'k-NN({sum(ns)})','linear, all labels'] and len(words)==1 and 'n_per_class=10' in words[0]

@pytest.mark.parametrize('kw,says', [(dict(k=99), 'k=99 neighbours of 20'), (dict(C=0), 'C=0'), (dict(C=float('nan')), 'C=nan'), (dict(seeds=0), 'seeds=0'), (dict(n_per_class=0), 'n_per_class=0')])
def test_wrong_settings_cost_nothing(kw, says):
    dls = uneven_dls(10, 10)
    with pytest.raises(ValueError, match=says): evaluate(Never(), dls, **kw)
    with pytest.raises(ValueError, match=says): compare({'a':Never()}, dls, **kw)

@pytest.mark.parametrize('f,says', [
    (lambda d: knn(Never(), d, k=21), 'k=21 neighbours of 20'), (lambda d: linear_probe(Never(), d, n_per_class=11), 'n=11 .* largest class has 10'),
    (lambda d: fine_tune(Never(), d, n_per_class=11), 'n=11 .* largest class has 10'), (lambda d: compare({'a':Never(), 'b':'oops'}, d), "'b' must be an encoder")])
def test_too_much_is_said_before_images_are_read(f, says):
    with pytest.raises((ValueError,TypeError), match=says): f(uneven_dls(10, 10))

def test_lists_and_arrays():
    y = torch.arange(20)%2
    x = features(y)
    for o in (y.tolist(), y.numpy(), tuple(y.tolist())): assert knn((x,o), (x.numpy(),o)).runs==knn((x,y), (x,y)).runs and linear_probe((x,o), (x,y)).runs==linear_probe((x,y), (x,y)).runs
    with pytest.raises(ValueError, match='must be of one kind'): knn((x,y.tolist()), (x,[[0,1]]*20))

@pytest.mark.parametrize('n', [2, 12, 19, 20, 21, 30])
def test_neighbours_of_few_images(n):
    "The default takes what there is; leaving one out there is one fewer"
    y = torch.arange(n)%2
    d = features(y),y
    a,b = knn(d, d),knn(d)
    assert (a.protocol,b.protocol)==(f'k-NN({min(n, 20)})',f'k-NN({min(n-1, 20)})') and a.settings['k']==min(n, 20)
    assert a.accuracy==pytest.approx(cosine(min(n, 20)).fit(*d).score(*d))
    for bad in (n+1, 0): 
        with pytest.raises(ValueError, match=f'k={bad} neighbours of {n}'): knn(d, d, k=bad)
    with pytest.raises(ValueError, match='no other training image'): knn((d[0][:1],y[:1]))


# A part of each class

@pytest.mark.parametrize('pct,ns', [(.1, (300,60,5)), (.01, (300,60,5)), (.5, (7,3,1)), (1., (9,2))])
def test_a_part_of_each_class(pct, ns):
    y = classes(*ns)
    t = sample_per_class((y,y), pct=pct)[1]
    assert t.bincount().tolist()==[max(1, round(pct*n)) for n in ns]
    assert not torch.equal(sample_per_class((torch.arange(len(y)),y), pct=pct)[0], sample_per_class((torch.arange(len(y)),y), seed=1, pct=pct)[0])

class Labels(Callback):
    order = 70
    def __init__(self, seen): self.seen = seen
    def before_step(self): self.seen.append(self.y.tolist())

@pytest.fixture
def seen(monkeypatch):
    "Labels of each step of the Learners in there"
    seen,fit = [],Learner.fit
    monkeypatch.setattr(Learner, 'fit', lambda self, *a, **k: fit(self.add_cb(Labels(seen)), *a, **k))
    return seen

enc = nn.Sequential(nn.Conv2d(1,4,3), nn.AdaptiveAvgPool2d(2), nn.Flatten())

@pytest.mark.filterwarnings('ignore:few steps')
def test_fine_tune_on_a_part(seen):
    "The papers' draw; with as many of each class it was the same"
    r = fine_tune(enc, uneven_dls(40, 20, 3), pct=.1, epochs=1)
    assert sorted(seen[0])==[0]*4+[1]*2+[2] and r.protocol=='fine-tuned, 10 % of the labels' and r.settings['pct']==.1 and r.settings['train']==7
    seen.clear(); fine_tune(enc, uneven_dls(20, 20), pct=.1, epochs=1); a = seen[0]
    seen.clear(); fine_tune(enc, uneven_dls(20, 20), n_per_class=2, epochs=1, lr=.01, lr_head=.2); assert seen[0]==a

def adam(opt): return 'sqr_mom' in opt.hypers[0]

def test_defaults_of_fine_tune(monkeypatch):
    "The papers' for a part of the labels and where rates are given; Adam and enough steps for so many of each class"
    steps,fit = [],Learner.fit
    class Look(Callback):
        order = 70
        def before_step(self): steps.append((adam(self.opt), len(self.y), [h['lr'] for h in self.opt.hypers]))
    monkeypatch.setattr(Learner, 'fit', lambda self, *a, **k: fit(self.add_cb(Look()), *a, **k))
    dls = uneven_dls(50, 50)
    def run(**kw): steps.clear(); return said(lambda: fine_tune(enc, dls, **kw))
    r,words = run(n_per_class=50)
    assert len(steps)==200 and {o[:2] for o in steps}=={(True,64),(True,36)} and steps[0][2]==[.001,.01] and steps[-1][2]==pytest.approx([.001/25,.01/25]) and not words
    assert (r.settings['opt'],r.settings['bs'],r.settings['epochs'])==('adam',64,100)
    run(n_per_class=50, epochs=2, bs=25); assert len(steps)==8 and all(o[:2]==(True,25) for o in steps)
    for kw,lrs in ((dict(pct=.5), [.01,.2]), (dict(n_per_class=25, lr=.1), [.1,.2]), (dict(n_per_class=25, lr_head=3.), [.01,3.])):
        r,words = run(**kw)
        assert len(steps)==20 and all(o[:2]==(False,50) for o in steps) and steps[0][2]==lrs and r.settings['opt']=='sgd' and r.settings['bs']==256
        assert any('few steps of training (20) for 50 images in batches of 256' in o and 'n_per_class' in o for o in words)
    with pytest.raises(ValueError, match='bs=0'): fine_tune(enc, dls, n_per_class=5, bs=0)
    with pytest.raises(ValueError, match='epochs=0'): fine_tune(enc, dls, n_per_class=5, epochs=0)

def test_a_hundred_images_are_enough_to_learn_from():
    "Where the papers' settings leave the new layer where it was"
    x,y = torch.rand(140,1,8,8, generator=rng())*.4,torch.arange(140)%2
    x[y==1,:,:4] += .4
    dls = tensor_dls((x[:100],y[:100]), (x[100:],y[100:]), bs=10)
    body = nn.Sequential(nn.Conv2d(1,4,3), nn.AdaptiveAvgPool2d((2,1)), nn.Flatten())
    a,_ = said(lambda: fine_tune(body, dls, n_per_class=50, resize_scale=(.8,1.)))
    assert a.accuracy>.95


# Several classes an image

def test_average_precision_is_scikit_learns():
    "With ties, and with scores that are all the same"
    y = has(200, 6)
    for s in (torch.rand(200, 6, generator=rng(1)), torch.rand(200, 6, generator=rng(1)).mul(5).round(), torch.zeros(200, 6), y.float(), 1-y.float()):
        assert average_precision(s, y).tolist()==pytest.approx([average_precision_score(y[:,i], s[:,i]) for i in range(6)])
    assert average_precision(torch.rand(5,2), torch.tensor([[0,1]]*5)).isnan().tolist()==[True,False]

def test_linear_probe_with_several_classes():
    "One logistic regression for each class"
    y = has()
    (x,y),(xt,yt) = train,test = halves(features(y), y)
    ref = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(C=.3, max_iter=2000, tol=1e-7))).fit(x.double(), y)
    r   = linear_probe(train, test, C=.3)
    assert r.accuracy==pytest.approx(average_precision_score(yt, ref.decision_function(xt.double()), average='macro'), abs=1e-4)
    assert (r.metric,r.top5,r.balanced,r.settings['train'])==('mAP',None,None,120) and str(r).startswith(f'linear, all labels: mAP {100*r.accuracy:.1f} % (C=0.3')

@pytest.mark.parametrize('k,temp', [(1,.07), (7,.07), (20,.5)])
def test_knn_with_several_classes(k, temp):
    "A class has the share of the weight of the neighbours that have it, here one query at a time"
    y = has()
    (x,y),(xt,yt) = train,test = halves(features(y), y)
    u,scores = nn.functional.normalize(x.double(), dim=1),[]
    for q in nn.functional.normalize(xt.double(), dim=1):
        sims = (u@q).tolist()
        near = sorted(range(len(x)), key=lambda i: -sims[i])[:k]
        w    = np.exp([sims[i]/temp for i in near])
        scores.append((w[:,None]*y[near].numpy()).sum(0)/w.sum())
    r = knn(train, test, k=k, temp=temp)
    assert r.accuracy==pytest.approx(average_precision_score(yt, np.array(scores).round(6), average='macro'), abs=2e-3) and r.metric=='mAP'
    assert knn(train, test, k=k, temp=temp, chunk=17).accuracy==pytest.approx(r.accuracy, abs=1e-6)

def test_knn_with_several_classes_leaves_itself_out():
    y = torch.tensor([[1,0],[1,0],[0,1],[0,1]])
    x = torch.tensor([[1.,0],[1.,.1],[0,1.],[.1,1.]])
    assert knn((x,y), k=1).accuracy==1. and knn((x,y[[0,2,1,3]]), k=1).accuracy<1.

@pytest.mark.parametrize('kind', ['int64','float32','bool','uint8'])
def test_kinds_of_zeros_and_ones(kind):
    y = has()
    x = features(y)
    a,b = (linear_probe(*halves(x, o)) for o in (y, y.to(getattr(torch, kind))))
    assert a.runs==b.runs and knn((x,y)).runs==knn((x,y.numpy())).runs

def test_a_class_that_nobody_has():
    y = has()
    (x,y),(xt,yt) = train,test = halves(features(y), y)
    yt = yt.clone(); yt[:,2] = 0
    r,words = said(lambda: knn(train, (xt,yt)))
    assert len(words)==1 and 'mAP is the mean of 4 of 5 columns' in words[0] and 0<r.accuracy<1
    with pytest.raises(ValueError, match='the test labels say nothing'): linear_probe(train, (xt,0*yt))
    y = y.clone(); y[:,1] = 0 # nor to learn from
    assert np.isfinite(linear_probe((x,y), (xt,yt)).accuracy)

def several(names, seed=0, n=24):
    "DataLoaders of fastai, whose labels are lists of names"
    g = np.random.default_rng(seed)
    x = torch.rand(n, 1, 4, 4, generator=rng(seed))
    words = [[o for o,p in zip(names, g.random(len(names))) if p>.5] for _ in range(n)]
    return Datasets(range(n), [[lambda i: x[i]], [lambda i: words[i], MultiCategorize(), OneHotEncode()]]).dataloaders(bs=8, num_workers=0).train,x,words

@pytest.mark.filterwarnings('ignore:mAP is the mean')
def test_several_classes_by_name():
    "The columns of another loader in the order of the first; labels lie ready"
    (a,*_),(b,_,more) = several(list('abc')),several(list('bc'), 1)
    rows = torch.tensor([[float(c in o) for c in 'abc'] for o in more])
    assert torch.equal(labelled_features(nn.Flatten(), (a,b))[1][1], rows) and ready_labels(a).shape==(24,3)
    assert [o.protocol for o in evaluate(nn.Flatten(), (a,b))]==['k-NN(20)','linear, all labels'] and evaluate(nn.Flatten(), (a,b))[0].metric=='mAP'
    with pytest.raises(ValueError, match='dls.train has not: d'): knn(nn.Flatten(), (a,several(list('ad'), 1)[0]))
    assert torch.equal(renumber(torch.tensor([[1,1]]), list('abc'), list('cb')), torch.tensor([[0,1,1]]))

def test_a_table_of_map():
    y = has(40, 3)
    x = torch.rand(40, 1, 4, 4)
    assert str(compare({'a':nn.Flatten()}, tensor_dls((x,y), (x,y), bs=8))).startswith('| mAP in % | k-NN(20) | linear, all labels |')


# Targets

@pytest.mark.parametrize('n,f,C', [(120,6,1.), (120,6,.01), (40,100,1.), (40,100,30.)])
@pytest.mark.parametrize('t', [(), (1,), (3,)])
def test_ridge_is_scikit_learns(n, f, C, t):
    "More images than features, or fewer; one target, or several"
    x,y = torch.randn(2*n, f, generator=rng()),100+30*torch.rand(2*n, *t, generator=rng(1))
    y = y + x[:,:1].reshape(-1, *[1]*len(t))*20
    (x,y),(xt,yt) = train,test = halves(x, y)
    ref = make_pipeline(StandardScaler(), Ridge(alpha=1/C)).fit(x.double(), y.double())
    r   = linear_probe(train, test, C=C)
    assert r.accuracy==pytest.approx(r2_score(yt.double(), ref.predict(xt.double())), abs=1e-6) and (r.protocol,r.metric)==('ridge, all labels','R²')
    assert str(r).startswith(f'ridge, all labels: R² {r.accuracy:.3f} (C=') and r.heading=='R²' and r.cell==f'{r.accuracy:.3f}'

def test_r_squared_is_scikit_learns():
    p,y = torch.randn(30, 4, generator=rng()),torch.randn(30, 4, generator=rng(1))
    assert r_squared(p, y).tolist()==pytest.approx(r2_score(y, p, multioutput='raw_values').tolist())
    y[:,1] = 3.
    r,words = said(lambda: result_of_columns('p', 'R²', r_squared(p, y)))
    assert r_squared(p, y).isnan().tolist()==[False,True,False,False] and r.accuracy==pytest.approx(r2_score(y[:,[0,2,3]], p[:,[0,2,3]])) and '3 of 4 columns' in words[0]

def target_dls(n=40, t=()):
    x,y = torch.rand(n, 1, 4, 4, generator=rng()),torch.randn(n, *t, generator=rng(1))
    return tensor_dls((x,y), (x[::2],y[::2]), bs=8)

@pytest.mark.parametrize('t', [(), (2,)])
def test_evaluate_targets(t):
    "The one question that makes sense; the same from a dataset of fastai, whose targets are not cut to whole numbers"
    dls = target_dls(t=t)
    res = evaluate(nn.Flatten(), dls)
    assert [o.protocol for o in res]==['ridge, all labels'] and str(compare({'a':nn.Flatten()}, dls)).startswith('| R² | ridge, all labels |')
    x,y = (torch.stack(o) for o in zip(*[(dls.train.dataset[i][0],dls.train.dataset[i][1]) for i in range(40)]))
    own = Datasets(range(40), [[lambda i: x[i].float()/255 if x.dtype==torch.uint8 else x[i]], [lambda i: y[i]]], splits=[range(40), range(0,40,2)]).dataloaders(bs=8, num_workers=0)
    assert torch.equal(ready_labels(own.train), y) and evaluate(nn.Flatten(), own)[0].accuracy==pytest.approx(res[0].accuracy, abs=1e-5)

def test_whole_floats_are_named():
    y = torch.arange(20).float()%3
    x = torch.randn(20, 4, generator=rng())
    assert any('y.long()' in o for o in said(lambda: linear_probe((x,y), (x,y)))[1]) and not said(lambda: linear_probe((x,y+.5), (x,y)))[1]


# Raw ids

@pytest.mark.filterwarnings('ignore:few steps')
@pytest.mark.parametrize('ids', [(7,99,200_000), (0,1,10**12), (3,4,5), (0,1,2)])
def test_raw_ids(ids, seen, monkeypatch):
    "The numbers of classes are names: answers are those of 0, 1, 2, and there are three outputs"
    y = torch.arange(60)%3
    x,raw = features(y),torch.tensor(ids)[y]
    assert label_kind(raw)=='classes'
    for f in (knn, linear_probe, lambda a,b: linear_probe(a, b, n_per_class=5, seeds=2), lambda a,b: knn(a, k=3)):
        a,b = f(*halves(x, y)),f(*halves(x, raw))
        assert a.runs==b.runs and b.top5 is None
    if ids[-1]>1e6: return # DataLoaders name every number up to the largest
    im = x[:,None,None].repeat(1,1,4,1).sigmoid()
    for f in (lambda d: sgd_probe(enc, d, epochs=1), lambda d: fine_tune(enc, d, n_per_class=5, epochs=1), lambda d: fine_tune(enc, d, pct=.5, epochs=1)):
        a,b = (f(tensor_dls(*halves(im, o), bs=8)) for o in (y, raw))
        assert a.runs==b.runs and set(sum(seen, []))<={0,1,2}
    assert [o.runs for o in evaluate(nn.Flatten(), tensor_dls(*halves(im, y), bs=8), seeds=2)]==[o.runs for o in evaluate(nn.Flatten(), tensor_dls(*halves(im, raw), bs=8), seeds=2)]

def test_number_classes():
    a,b,found = number_classes(torch.tensor([9,5,9]), torch.tensor([7]))
    assert a.tolist()==[2,0,2] and b.tolist()==[1] and found.tolist()==[5,7,9]

def test_ids_that_only_the_test_has():
    x = torch.eye(3)
    assert knn((x[:2],torch.tensor([40,80])), (x,torch.tensor([40,80,60])), k=1).accuracy==pytest.approx(2/3)


# What does not go together

y3 = torch.arange(30)%3
x3 = torch.randn(30, 4, generator=rng())
multi,floats = has(30, 3),torch.randn(30, generator=rng(2))
d3,dm,dt = (x3,y3),(x3,multi),(x3,floats)
im3 = torch.rand(30, 1, 8, 8)
def dls_of(y): return tensor_dls((im3,y), (im3,y), bs=8)

@pytest.mark.parametrize('f,says', [
    (lambda: knn(dt, dt), r'train has labels of type torch.float32 and shape \(30,\): .*0 and 1 for each class.*targets of a regression go with linear_probe.*y.long'),
    (lambda: knn(Never(), dls_of(floats)), 'torch.float32'),
    (lambda: linear_probe(dm, dm, n_per_class=3), 'n_per_class=3: labels are drawn of each class.*multi-label'), (lambda: linear_probe(dt, dt, n_per_class=3), 'n_per_class=3.*targets'),
    (lambda: linear_probe(Never(), dls_of(multi), n_per_class=3), 'n_per_class=3.*multi-label'),
    (lambda: sample_per_class(dm, 3), 'several classes an image'), (lambda: sample_per_class(d3, 3, pct=.1), 'n=3, pct=0.1: give one'), (lambda: sample_per_class(d3), 'n=None, pct=None'),
    (lambda: sample_per_class(d3, pct=1.5), 'pct=1.5'),
    (lambda: sgd_probe(Never(), dls_of(multi)), 'several classes an image.*linear_probe'), (lambda: sgd_probe(Never(), dls_of(floats)), 'targets of a regression go with linear_probe.*y.long'),
    (lambda: fine_tune(Never(), dls_of(multi), pct=.5), 'several classes an image'), (lambda: fine_tune(Never(), dls_of(floats), n_per_class=3), 'targets of a regression'),
    (lambda: linear_probe(d3, dm), r'torch.int64 and shape \(30,\), and test torch.int64 and shape \(30, 3\): they must be of one kind'), (lambda: knn(dm, d3), 'must be of one kind'),
    (lambda: linear_probe(d3, dt), 'must be of one kind'), (lambda: linear_probe(dm, (x3,multi[:,:2])), 'give as many columns'), (lambda: linear_probe((x3,x3), (x3,x3[:,:3])), 'give as many columns'),
    (lambda: linear_probe((x3,floats/0), dt), 'NaN or infinite'), (lambda: knn((x3,multi*2), dm), r'torch.int64 and shape \(30, 3\)'), (lambda: knn((x3,y3-1), d3), 'below 0'),
    (lambda: knn((x3,['cat']*30), d3), 'train must hold tensors.*number the classes'), (lambda: knn((x3,np.array(['cat']*30)), d3), 'number the classes'),
    (lambda: linear_probe((x3,torch.zeros(30,2,2)), d3), r'shape \(30, 2, 2\)'), (lambda: linear_probe(dt, (x3,torch.ones(30))), 'the test labels say nothing'),
    (lambda: check_labels(dm, 'dls'), r'dls has labels.*they must be numbers of classes.*go with knn, linear_probe and evaluate')])
def test_refused(f, says):
    with pytest.raises((ValueError,TypeError), match=says): f()
