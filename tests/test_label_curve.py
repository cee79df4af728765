"Accuracy over labels, where curves cross, and what is confused: against slow loops and scikit-learn"
import csv, json, warnings

import numpy as np, pytest, torch
from PIL import Image
from fastai.vision.all import DataLoaders, Learner, imagenet_stats
from matplotlib import pyplot as plt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, recall_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from self_supervised import cli, cli_labels
from self_supervised.all import (LabelCurve, Result, SimCLR, create_encoder, create_simclr_model, evaluate, extract_features, fine_tune, fresh_encoder, get_simclr_aug_pipelines, image_dls,
                                 knn, label_curve, linear_probe, tensor_dls)
from self_supervised.data import fashion_mnist

def blobs(ns, seed=0, d=5, noise=1.5):
    "Features of classes of `ns` images, mixed"
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.full((n,), c) for c,n in enumerate(ns)])[torch.randperm(sum(ns), generator=g)]
    return torch.randn(len(ns), d, generator=torch.Generator().manual_seed(9))[y]*1.5+noise*torch.randn(len(y), d, generator=g, dtype=torch.float64),y

def drawn(y, n, seed):
    "Ids of a draw, image by image"
    left,ids = [n]*(int(y.max())+1),[]
    for i in torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).tolist():
        if left[y[i]]:
            left[y[i]] -= 1
            ids.append(i)
    return sorted(ids)

def said_by_sklearn(train, test, ids):
    x,y = (o[ids].numpy() for o in train)
    mu,sd = x.mean(0),x.std(0)
    return LogisticRegression(C=1., tol=1e-8, max_iter=5000).fit((x-mu)/sd, y).predict((test[0].numpy()-mu)/sd)

# ---- the curve

@pytest.mark.parametrize('ns', [(60,60,60), (60,20,9)])
def test_equals_a_slow_loop(ns):
    "For each number of labels and each draw, logistic regression of scikit-learn; balanced where classes are uneven"
    train,test = blobs(ns, 1),blobs(ns, 2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = label_curve({'a':(train,test)}, counts=(2,8,None), seeds=3, scratch=False)
    uneven = len(set(ns))>1
    assert c.counts==[2,8,None] and c.balanced==uneven and c.n_all==pytest.approx(sum(ns)/3)
    for n in c.counts:
        want = []
        for seed in range(1 if n is None else 3):
            said = said_by_sklearn(train, test, list(range(len(train[1]))) if n is None else drawn(train[1], n, seed))
            want.append(balanced_accuracy_score(test[1], said) if uneven else np.mean(said==test[1].numpy()))
        assert c.runs('a', n)==pytest.approx(want, abs=1e-9)
    assert float(c['a'][8])==float(linear_probe(train, test, n_per_class=8, seeds=3))

def test_the_same_draws_for_every_encoder():
    "Features times two are standardised to the same numbers: the rows agree run for run; other draws would not"
    (train,test),two = (blobs((40,)*4, i, noise=3.) for i in (1,2)),lambda o: (2*o[0], o[1])
    c = label_curve({'a':(train,test), 'b':(two(train),two(test))}, counts=(1,3), seeds=6, scratch=False)
    assert all(c.runs('a', n)==c.runs('b', n) and len({*c.runs('a', n)})>3 for n in (1,3))

class Recorder(nn.Module):
    "Brightness is the feature; notes which images it was trained on, by their brightness"
    seen = []
    def __init__(self): super().__init__(); self.lin = nn.Linear(1, 1)
    def forward(self, x):
        v = x.mean((1,2,3))
        if self.training: Recorder.seen.append((255*v).round().int().tolist())
        return self.lin(v[:,None])

@pytest.mark.parametrize('row', ['fine_tuned', 'scratch'])
def test_whole_networks_are_trained_on_the_same_draws(row):
    y   = torch.arange(30)%3
    x   = torch.arange(30, dtype=torch.uint8)[:,None,None,None].expand(30,1,4,4).contiguous()
    dls = tensor_dls((x,y), (x,y), bs=8, device='cpu')
    Recorder.seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = label_curve({'a':Recorder()}, dls, counts=(2,), seeds=3, tune_seeds=2, tune_steps=1, **{'scratch':False, row:True})
    assert list(c)==['a', dict(fine_tuned='a, fine-tuned')[row] if row=='fine_tuned' else 'scratch'] and [len(o[2].runs) for o in c.values()]==[3,2]
    steps = len(Recorder.seen)//2
    for seed in range(2): assert sorted({i for b in Recorder.seen[seed*steps:(seed+1)*steps] for i in b})==drawn(y, 2, seed)

def test_rows_and_what_is_shown():
    (x,y),test = fashion_mnist()
    dls,shown = tensor_dls((x[:60],y[:60]), (test[0][:50],test[1][:50]), bs=30, device='cpu'),[]
    net = nn.Sequential(nn.Conv2d(1,4,3,stride=2), nn.Flatten(), nn.Linear(4*13*13,6))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = label_curve({'a':net}, dls, counts=(None,1), seeds=2, random=True, fine_tuned=True, tune_steps=1, show=lambda *o: shown.append(o))
    assert list(c)==['a','a, fine-tuned','random','scratch'] and all(list(o)==[1,None] for o in c.values())
    assert [o[:2] for o in shown]==[(k,n) for k in ('a','random','a, fine-tuned','scratch') for n in (1,None)] and all(c[k][n] is r for k,n,r in shown)
    assert [len(c[k][None].runs) for k in c]==[1,2,1,2]
    big = max(y[:60].bincount().tolist())
    assert c['a, fine-tuned'][None].settings['n_per_class']==big and c['a, fine-tuned'][None].settings['train']==60

def pair(net, dls): return tuple(extract_features(net, dl) for dl in dls)

def test_an_untrained_encoder_of_ones_own():
    (x,y),test = fashion_mnist()
    dls = tensor_dls((x[:60],y[:60]), (test[0][:50],test[1][:50]), bs=30, device='cpu')
    net,mine = (nn.Sequential(nn.Conv2d(1,4,3,stride=2), nn.Flatten(), nn.Linear(4*13*13,6)) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = label_curve({'a':net}, dls, counts=(1,), seeds=2, random=True, scratch=mine, tune_steps=45)
        assert c['random'][1].runs==linear_probe(mine, dls, n_per_class=1, seeds=2).runs
        assert c['scratch'][1].runs==fine_tune(mine, dls, n_per_class=1, seeds=2, epochs=45).runs
        assert label_curve({'a':pair(net, dls)}, dls, counts=(1,), seeds=2, scratch=False)['a'][1].runs==c['a'][1].runs

def test_new_rows_see_what_the_learner_saw():
    "random and scratch have the normalisation of the Learner's views"
    (x,y),test = fashion_mnist()
    dls  = tensor_dls((x[:60],y[:60]), (test[0][:50],test[1][:50]), bs=30, device='cpu')
    net  = nn.Sequential(nn.Conv2d(1,4,3,stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64,6))
    mine = fresh_encoder(net)
    augs = get_simclr_aug_pipelines(28, jitter=False, bw=False, blur=False, stats=((.3,),(.2,)))
    learn = Learner(dls, create_simclr_model(net, 8, 4), cbs=SimCLR(augs))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = label_curve({'a':learn}, dls, counts=(2,), seeds=1, random=True, scratch=mine, tune_steps=1, tune=dict(bs=5))
        assert c['random'][2].runs==linear_probe(mine, dls, n_per_class=2, stats=((.3,),(.2,))).runs
        assert c['scratch'][2].settings['stats'] and c['scratch'][2].runs==fine_tune(mine, dls, n_per_class=2, epochs=20, bs=5, stats=((.3,),(.2,))).runs

def test_what_no_class_has():
    train,test = blobs((10,10), 1),blobs((10,10), 2)
    with pytest.warns(UserWarning, match='the largest class has 10 labels: what counts asks for beyond, 10, 50, is left out'):
        assert label_curve({'a':(train,test)}, counts=(1,10,50,None), scratch=False).counts==[1,None]
    with pytest.warns(UserWarning, match='beyond, 11, is left out'): # ten are not all, as nobody asked for these
        assert label_curve({'a':(train,test)}, counts=(10,11), scratch=False).counts==[10]

def test_some_classes_have_fewer():
    train,test = blobs((30,4), 1),blobs((30,30), 2)
    with pytest.warns(UserWarning, match='1 of 2 classes have fewer than 10'): c = label_curve({'a':(train,test)}, counts=(10,), scratch=False)
    assert c['a'][10].protocol=='linear, up to 10 labels a class' and c['a'][10].settings['train']==14

@pytest.mark.parametrize('kw,error,msg', [
    (dict(encoders={}), ValueError, 'encoders is empty'),
    (dict(encoders={'a':3}), TypeError, "'a' is a int, it must be an encoder, a Learner, or features"),
    (dict(dls=None), ValueError, 'dls is missing'),
    (dict(counts=()), ValueError, r'counts=\(\) must be'), (dict(counts=(0,1)), ValueError, r'counts=\(0, 1\) must be'),
    (dict(seeds=0), ValueError, 'seeds=0'), (dict(C=0), ValueError, 'C=0 must be positive'),
    (dict(tune_seeds=0), ValueError, 'tune_seeds=0 and tune_steps=1000 must be 1 or more'), (dict(tune=dict(pct=.1)), ValueError, 'may have lr, lr_head'), (dict(fine_tuned=['b']), ValueError, "fine_tuned: 'b' is no encoder here, there are a"),
    (dict(encoders={'scratch':nn.Flatten()}), ValueError, 'scratch is the name of another row'),
    (dict(encoders={'a':nn.Flatten(), 'a, fine-tuned':nn.Flatten()}, fine_tuned=True), ValueError, 'a, fine-tuned is the name of another row'),
    (dict(counts=(500,), scratch=False), ValueError, 'n=500 labels of each class, but the largest class has'),
    (dict(encoders={'a':(blobs((9,9)),blobs((9,9)))}, scratch=True), ValueError, 'all encoders are features: give an untrained encoder as `scratch`'),
    (dict(encoders={'a':(blobs((9,9)),blobs((9,9))), 'b':(blobs((9,9), 5),blobs((9,9)))}, scratch=False, counts=(1,)), ValueError, "'b' has other labels than 'a'"),
])
def test_errors(kw, error, msg):
    (x,y),_ = fashion_mnist()
    dls = tensor_dls((x[:40],y[:40]), (x[40:60],y[40:60]), bs=20, device='cpu')
    with pytest.raises(error, match=msg): label_curve(**{'encoders':{'a':nn.Flatten()}, 'dls':dls, **kw})

def test_loaders_that_cannot_be_drawn_from():
    x,y = torch.rand(8,1,4,4),torch.arange(8)%2
    with pytest.raises(TypeError, match='dls.train is a list, and networks are trained on images drawn by number: .*or scratch=False'): label_curve({'a':nn.Flatten()}, ([(x,y)],[(x,y)]))
    assert label_curve({'a':nn.Flatten()}, ([(x,y)],[(x,y)]), counts=(1,), scratch=False).counts==[1]

@pytest.mark.parametrize('y', [torch.eye(8).long(), torch.rand(8)])
def test_labels_that_are_no_classes(y):
    x = torch.rand(8,3)
    with pytest.raises(ValueError, match='they must be numbers of classes'): label_curve({'a':((x,y),(x,y))}, scratch=False)

# ---- new weights

@pytest.mark.parametrize('make', [lambda: nn.Sequential(nn.Conv2d(3,8,3,bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,4)),
                                  lambda: create_encoder('test_mambaout', pretrained=False, n_in=1), lambda: create_encoder('xresnet18', pretrained=False),
                                  lambda: create_encoder('vit_tiny_patch16_224', pretrained=False, pool_type=None, img_size=32),
                                  lambda: nn.Sequential(nn.Conv2d(3,8,4,4), nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 16, batch_first=True))])
def test_fresh_encoder(make):
    "The same architecture, other weights, and the old one stays; buffers are as in a new one"
    old = make()
    for o in old.buffers():
        if o.is_floating_point(): o.add_(3.)
    before = {k:v.clone() for k,v in old.state_dict().items()}
    new    = fresh_encoder(old)
    assert {k:v.shape for k,v in new.state_dict().items()}=={k:v.shape for k,v in before.items()}
    assert all(torch.equal(v, before[k]) for k,v in old.state_dict().items())
    mean = next((k for k in before if k.endswith('running_mean')), None)
    if mean: assert not new.state_dict()[mean].any()
    assert not [k for (k,a),b in zip(old.named_parameters(), new.parameters()) if a.ndim>1 and a.any() and torch.equal(a, b)]

def test_fresh_encoder_has_nothing_left_of_the_old():
    "Weights of one layer at a thousand are at their usual size afterwards"
    old = nn.Sequential(nn.Linear(100,100), nn.MultiheadAttention(20,2))
    with torch.no_grad(): [p.fill_(1000.) for p in old.parameters()]
    assert max(p.abs().max() for p in fresh_encoder(old).parameters())<=1

def test_weights_that_cannot_be_drawn():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.token = nn.Parameter(torch.zeros(1,3))
    with pytest.raises(ValueError, match=r'the encoder \(Net\) has weights that it cannot draw again: give an untrained encoder as `scratch`'): fresh_encoder(Net())
    with pytest.raises(ValueError, match=r'body \(Net\)'): fresh_encoder(nn.ModuleDict({'body':Net()}))

# ---- words

def curve(a, b, spread=0., **kwargs):
    "Two rows of three runs each, around these accuracies in percent, at as many numbers of labels"
    ns = [1,2,5,10,50,None]
    def row(xs, s): return {n:Result('p', [x/100-s, x/100, x/100+s]) for n,x in zip(ns, xs)}
    return LabelCurve({'mine':row(a, spread), 'scratch':row(b, 0.)}, **kwargs)

@pytest.mark.parametrize('a,b,says', [
    ([50,60,70,80,85,88],   [30,40,50,60,80,89.2], 'mine beats scratch up to about 50 labels a class, by 5.0 to 20.0; with all, scratch is better by 1.2'),
    ([50,60,70,80,85,88],   [30,40,50,60,80,85],   'mine beats scratch at every number of labels, by 3.0 to 20.0'),
    ([30,40,50,60,80,85],   [50,60,70,80,85,88],   'scratch beats mine at every number of labels, by 3.0 to 20.0'),
    ([50,60,70,80,85,88],   [30,40,50,60,85,88],   'mine beats scratch up to about 10 labels a class, by 20.0; from 50 labels a class on, neither mine nor scratch is ahead by more than the spread'),
    ([50,60],               [50,55],               'with 1 label a class, neither mine nor scratch is ahead by more than the spread; with 2 labels a class, mine is better by 5.0'),
    ([50,60,70,80],         [55,60,60,83],         'scratch beats mine with 1 label a class, by 5.0; with 2 labels a class, neither mine nor scratch is ahead by more than the spread; '
                                                   'with 5 labels a class, mine is better by 10.0; with 10 labels a class, scratch is better by 3.0'),
    ([50,61,72,80],         [55,60,70,83],         'scratch beats mine with 1 label a class, by 5.0; from 2 to 5 labels a class, mine is better by 1.0 to 2.0; with 10 labels a class, scratch is better by 3.0'),
])
def test_crossing(a, b, says): assert curve(a, b).crossing('mine', 'scratch')==says

def test_nothing_is_claimed_within_the_spread():
    "Three draws that are ± s: the standard error is s/√3, and twice that is asked for"
    s = .02
    for d,ahead in ((2*s/3**.5+1e-6, True), (2*s/3**.5-1e-6, False)):
        c = curve([60+100*d], [60], s)
        assert c.differences('mine', 'scratch')[1]==(pytest.approx(d), pytest.approx(s/3**.5))
        assert c.crossing('mine', 'scratch').startswith('mine beats scratch')==ahead

def test_draws_are_paired():
    "Rows that go up and down together differ by the same in each draw; with fewer draws in one of them both variances count"
    xs = [.4,.5,.6]
    both = LabelCurve({'a':{1:Result('p', xs)}, 'b':{1:Result('p', [x-.01 for x in xs])}})
    assert both.differences('a', 'b')[1]==(pytest.approx(.01), pytest.approx(0, abs=1e-9))
    less = LabelCurve({'a':{1:Result('p', xs)}, 'b':{1:Result('p', [.3,.5])}})
    assert less.differences('a', 'b')[1]==(pytest.approx(.1), pytest.approx((.01/3+.02/2)**.5))

@pytest.mark.parametrize('balanced', [False, True])
def test_test_images_count(balanced):
    "The variance of a share of M images, or of the mean of the shares of the classes; counts are of two runs together"
    m = torch.tensor([[60,20],[4,16]])
    r = Result('p', [.7,.8], confusion=m, balanced_runs=[.7,.8] if balanced else None)
    def v(hit, n): p = (hit+1)/(n+2); return p*(1-p)/n
    want = (v(30, 40)+v(8, 10))/4 if balanced else v(38, 50)
    assert LabelCurve({'a':{1:r}, 'b':{1:r}}).differences('a', 'b')[1]==(0, pytest.approx((2*want)**.5))

def test_few_test_images_claim_nothing():
    "All of 10 test images right, and 7 of them: no claim; of 1,000 it is one"
    for n,ahead in ((10, False), (1000, True)):
        a,b = (Result('p', [k/10], confusion=torch.tensor([[k*n//20,n//2-k*n//20],[n//2-k*n//20,k*n//20]])) for k in (10,7))
        assert LabelCurve({'a':{None:a}, 'b':{None:b}}).crossing('a', 'b').startswith('a beats b with all, by 30.0')==ahead

def test_spread_alone_can_be_seen():
    "Two draws of random features against others: of twenty pairs of equal encoders at most a few are called different"
    called = 0
    for i in range(20):
        rows = {nm:tuple((torch.randn(60,3,generator=torch.Generator().manual_seed(1000*i+10*j+k)), torch.arange(60)%3) for k in range(2)) for j,nm in enumerate('ab')}
        called += 'neither' not in label_curve(rows, counts=(5,), seeds=3, scratch=False).crossing('a', 'b')
    assert called<=4

def test_rows_that_are_not_there():
    c = curve([50], [40])
    with pytest.raises(ValueError, match="no row 'theirs': there are mine, scratch"): c.crossing('mine', 'theirs')
    assert LabelCurve({'a':{1:Result('p', [.5])}, 'b':{2:Result('p', [.5])}}).crossing('a', 'b')=='a and b have no number of labels in common'

def test_table_numbers_and_picture():
    c = curve([50,60,70,80,85,88], [30,40,50,60,80,89.2], .01, n_all=300)
    head,_,first,*_ = str(c).splitlines()
    assert [o.strip() for o in head.split('|')[1:-1]]==['accuracy in %, labels a class','1','2','5','10','50','all']
    assert [o.strip() for o in first.split('|')[1:3]]==['mine','50.0 ± 1.0']
    assert str(c).endswith('\n\n- '+c.crossing('mine', 'scratch'))
    assert c.numbers()[5]=={'encoder':'mine', 'labels':'all', 'accuracy':pytest.approx(.88), 'std':pytest.approx(.01), 'runs':3} and len(c.numbers())==12
    ax = c.plot()
    mine,scratch = ax.get_lines()
    assert [o.get_label() for o in (mine,scratch)]==['mine','scratch'] and [*mine.get_xdata()]==[1,2,5,10,50,300] and [*mine.get_ydata()]==pytest.approx([50,60,70,80,85,88])
    band = ax.collections[0].get_paths()[0].vertices
    assert {round(v, 6) for x,v in band if x==1}=={49.,51.} and [o.get_text() for o in ax.get_xticklabels()]==['1','2','5','10','50','all']
    plt.close(ax.figure)

def test_words_of_what_was_trained_on():
    "The first row and each other one, and what was fine-tuned against training from nothing"
    c = LabelCurve({nm:{1:Result('p', [v])} for nm,v in {'mine':.5, 'mine, fine-tuned':.6, 'scratch':.4}.items()})
    assert c.words()==['mine, fine-tuned beats mine with 1 label a class, by 10.0', 'mine beats scratch with 1 label a class, by 10.0', 'mine, fine-tuned beats scratch with 1 label a class, by 20.0']

# ---- what is confused

@pytest.mark.parametrize('ask', ['linear', 'linear, draws', 'knn', 'knn among themselves'])
def test_confusion_equals_sklearn(ask):
    "Counts of all runs together; accuracy of each class is its recall; the pairs are the largest entries beside the diagonal"
    train,test = blobs((50,30,8), 1),blobs((45,25,10), 2)
    if ask=='linear':            r,said,yt = linear_probe(train, test),[said_by_sklearn(train, test, list(range(88)))],test[1]
    elif ask=='linear, draws':   r,said,yt = linear_probe(train, test, n_per_class=5, seeds=4),[said_by_sklearn(train, test, drawn(train[1], 5, s)) for s in range(4)],test[1]
    elif ask=='knn':             r,said,yt = knn(train, test, k=1, chunk=7),[KNeighborsClassifier(1, metric='cosine').fit(*train).predict(test[0])],test[1]
    else:
        near = KNeighborsClassifier(2, metric='cosine').fit(*train).kneighbors(train[0], return_distance=False)[:,1]
        r,said,yt = knn(train, k=1),[train[1][near].numpy()],train[1]
    want = sum(confusion_matrix(yt, o) for o in said)
    assert (r.confusion.numpy()==want).all() and r.balanced==pytest.approx(np.mean([balanced_accuracy_score(yt, o) for o in said]))
    assert r.balanced_runs==pytest.approx([balanced_accuracy_score(yt, o) for o in said])
    assert [o['accuracy'] for o in r.per_class()]==pytest.approx(np.mean([recall_score(yt, o, average=None) for o in said], axis=0))
    assert [(o['class'],o['images']) for o in r.per_class()]==[(str(i),n) for i,n in enumerate(yt.bincount().tolist())]
    pairs = sorted(((want[i,j],i,j) for i in range(3) for j in range(3) if i!=j and want[i,j]), key=lambda o: (-o[0], *o[1:]))
    assert r.confusions()==[dict(true=str(i), said=str(j), count=int(n), share=pytest.approx(n/want[i].sum())) for n,i,j in pairs]
    assert r.confusions(2)==r.confusions()[:2]

def test_classes_by_number_and_without_test_images():
    "Labels with gaps keep their numbers; a class that is only trained on is a column, and no row of the table"
    x,y = blobs((20,20,20), 1)
    y,t = torch.tensor([3,7,11])[y],torch.tensor([3,7])[blobs((20,20), 2)[1]]
    r = linear_probe((x,y), (blobs((20,20), 2)[0],t))
    assert r.classes==['3','7','11'] and r.confusion.shape==(3,3) and [o['class'] for o in r.per_class()]==['3','7']

def pictures(path, ns=dict(cat=9, dog=6), size=12):
    for c,n in ns.items():
        for i in range(n):
            (path/c).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(100*len(c)+i).integers(0, 255-100*(c=='cat'), (size,size), dtype=np.uint8)).save(path/c/f'{i}.png')
    return path

def test_names_of_classes(tmp_path):
    "Of the folders, in all questions"
    fns = sorted(pictures(tmp_path).glob('*/*.png'))
    dls = image_dls(fns, size=12, n_in=1, bs=5, label_func=lambda f: f.parent.name, valid_pct=.4, device='cpu')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        rs = [*evaluate(nn.Flatten(), dls, n_per_class=2, seeds=2), knn(nn.Flatten(), dls), linear_probe(nn.Flatten(), dls), *label_curve({'a':nn.Flatten()}, dls, counts=(1,), scratch=False)['a'].values()]
    assert all(r.classes==['cat','dog'] for r in rs) and [o['class'] for o in rs[0].per_class()]==['cat','dog']

def test_fine_tuning_knows_what_is_confused(tmp_path):
    fns = sorted(pictures(tmp_path).glob('*/*.png'))
    dls = image_dls(fns, size=12, n_in=1, bs=5, label_func=lambda f: f.parent.name, valid_pct=.4, device='cpu')
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        r = fine_tune(net, dls, n_per_class=2, epochs=1, seeds=2)
    assert r.classes==['cat','dog'] and int(r.confusion.sum())==2*len(dls.valid_ds) and r.confusion.diag().sum().item()/r.confusion.sum().item()==pytest.approx(r.accuracy)

def test_no_confusions_of_other_labels():
    x = torch.rand(20,3)
    for y in (torch.randint(0, 2, (20,2)), x@torch.rand(3)):
        r = linear_probe((x,y), (x,y))
        assert r.confusion is None
        with pytest.raises(ValueError, match='there is no confusion matrix, which knn'): r.confusions()
    with pytest.raises(ValueError, match='n=0 pairs'): knn(blobs((9,9)), k=1).confusions(0)

def test_all_right():
    x,y = torch.eye(3).repeat(4,1),torch.arange(3).repeat(4)
    assert str(knn((x,y), (x,y), k=1).confusions())=='none' and [o['accuracy'] for o in knn((x,y), (x,y), k=1).per_class()]==[1.]*3

# ---- the command

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return pictures(tmp_path_factory.mktemp('labelled'), dict(cat=20, dog=20))

how = dict(n_in=1, size=16, workers=0)

def test_command(folder, tmp_path, capsys):
    "Prints what label_curve gives, and writes the numbers and the picture"
    figures = plt.get_fignums()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = cli.ssl_labels('random:test_mambaout', folder, counts=[2,None], seeds=2, others=['random:test_vit'], tune_steps=1, random=True, results=tmp_path/'l.csv', **how)
    said = capsys.readouterr().out
    assert list(c)==['random:test_mambaout','random:test_vit','random','scratch'] and str(c) in said and 'scratch, all labels a class: ' in said and 'random:test_vit, 2' not in said
    with (tmp_path/'l.csv').open() as f: rows = list(csv.DictReader(f))
    assert [(o['encoder'],o['labels']) for o in rows]==[(k,n) for k in c for n in ('2','all')]
    assert [float(o['accuracy']) for o in rows]==pytest.approx([np.mean(c.runs(k, n)) for k in c for n in (2,None)])
    with Image.open(tmp_path/'l.png') as im: assert im.width>400
    assert sorted(o.name for o in tmp_path.iterdir())==['l.csv','l.png'] and plt.get_fignums()==figures

def test_beside_the_encoder(folder, tmp_path, capsys):
    net = create_simclr_model(create_encoder('test_mambaout', pretrained=False, n_in=1), 8, 4)
    file = Learner(DataLoaders([], []), net, loss_func=len).export_encoder(tmp_path/'encoder.safetensors')
    c = cli.ssl_labels(str(tmp_path), folder, counts=[1], seeds=2, scratch=False, size=12, workers=0)
    assert list(c)==[str(tmp_path)] and {'labels.csv','labels.png'} < {o.name for o in file.parent.iterdir()}
    assert c[str(tmp_path)][1].classes==['cat','dog']

def test_imagenet(folder, tmp_path, monkeypatch):
    "ImageNet weights, with the normalisation of ImageNet"
    import self_supervised.encoders as encoders, self_supervised.features as features
    asked,stats = [],[]
    make,extract = encoders.create_encoder,features.extract_features
    monkeypatch.setattr(encoders, 'create_encoder', lambda arch, pretrained=None, **kw: (asked.append((arch,pretrained)), make(arch, pretrained=False, **kw))[1])
    monkeypatch.setattr(features, 'extract_features', lambda o, dl, s=None, **kw: (stats.append(s), extract(o, dl, s, **kw))[1])
    c = cli.ssl_labels('random:test_mambaout', folder, counts=[1], seeds=1, scratch=False, others=['imagenet:test_mambaout'], n_in=3, size=12, workers=0, results=tmp_path/'l.csv')
    assert asked[-1]==('test_mambaout',True) and stats==[imagenet_stats]*2 and list(c)==['random:test_mambaout','imagenet:test_mambaout']

@pytest.mark.parametrize('kw,msg', [(dict(others=['nothing']), 'nothing is not a folder of a run'), (dict(others=['imagenet:']), 'write imagenet:resnet50'), (dict(results='x.png'), r'--results x.png must be a name that ends in .csv')])
def test_command_refuses(kw, msg, folder, monkeypatch):
    monkeypatch.setattr(cli_labels, 'Judge', lambda *a, **k: pytest.fail('too late'))
    with pytest.raises(ValueError, match=msg): cli.ssl_labels('random:test_mambaout', folder, **kw, **how)

@pytest.mark.parametrize('words,says', [('--counts 0', 'must be a number of labels a class, 1 or more, or all'), ('--counts few', "'few' must be"), ('--tune-seeds 0', '0 must be 1 or more'), ('--scratch', 'is unknown')])
def test_flags(words, says, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['ssl_labels', 'X', 'Y', *words.split()])
    with pytest.raises(SystemExit): cli.ssl_labels()
    assert says in capsys.readouterr().err

def test_results_jsonl_is_as_it_was(folder, tmp_path):
    "What is known of confusions stays out of the file"
    cli.ssl_knn('random:test_mambaout', folder, results=tmp_path/'r.jsonl', **how)
    assert set(json.loads((tmp_path/'r.jsonl').read_text()))=={'protocol','accuracy','std','top5','balanced','largest','metric','runs','settings','encoder','data','size','resize','self_supervised','commit','time'}
