"The columns of OnlineKNN and OnlineProbe say what `knn` and `linear_probe` say, and the run is the same to the bit with and without them"
import gc, math, random
from functools import partial

import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find into Learner)
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner, load_learner
from fastai.torch_core import set_seed
from torch import nn

from self_supervised.checkpoint import Checkpoint
from self_supervised.data import tensor_dls
from self_supervised.dist import rank
from self_supervised.evaluation import OnlineKNN, OnlineProbe, knn, linear_probe

from methods import callback, images, learner, methods, model, quiet
from processes import on_ranks

def encoder(): return nn.Sequential(nn.Conv2d(1,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.2), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def labelled(n=30, size=16, seed=1, classes=3):
    "Other images than those to train on, of another size, brighter from class to class"
    g = torch.Generator().manual_seed(seed)
    x,y = torch.randint(0, 100, (2*n,1,size,size), generator=g),torch.arange(2*n)%classes
    x = (x+50*y[:,None,None,None]).byte()
    return tensor_dls((x[:n],y[:n]), (x[n:],y[n:]), bs=8)

def both(dls=None, **kwargs):
    dls = labelled() if dls is None else dls
    return [OnlineKNN(dls, k=5, **kwargs), OnlineProbe(dls, **kwargs)]

def fit(name, cbs=(), epochs=3, dls=None, start_epoch=0, **kwargs):
    set_seed(3)
    dls = tensor_dls(images(), images(12), bs=8, seed=0) if dls is None else dls
    learn = learner(name, dls, model(name, enc=encoder()), cbs=cbs, **kwargs)
    quiet(learn, epochs, .05, start_epoch=start_epoch)
    return learn

def trace(learn):
    "All that a run leaves: weights, buffers, queue, losses, and where the random generators are"
    return ({k:v.clone() for k,v in learn.model.state_dict().items()}, [float(o) for o in learn.recorder.losses], torch.get_rng_state(),
            random.getstate(), learn.dls.train.rng.getstate(), [o.training for o in learn.model.modules()])

def assert_same(a, b):
    assert a[0].keys()==b[0].keys() and all(torch.equal(v, b[0][k]) for k,v in a[0].items())
    assert a[1]==b[1] and torch.equal(a[2], b[2]) and a[3:]==b[3:]

@pytest.mark.parametrize('name,own', [*((o,False) for o in methods), ('swav',True)])
def test_bit_identical(name, own):
    "With batch norm, dropout and queue; on data of its own, and on the very loaders that are trained on"
    (x,y),(xt,yt) = ((o,torch.arange(len(o))%2) for o in (images(),images(12)))
    dls = lambda: tensor_dls((x,y), (xt,yt), bs=8, seed=0)
    a,mine = trace(fit(name, dls=dls())),dls()
    learn = fit(name, both(None if own else mine), dls=mine)
    assert_same(a, trace(learn))
    assert len(learn.online_knn.history)==3 and len(learn.online_probe.history)==3

def test_columns():
    "What stands in table, recorder and history is what the functions say of the encoder at the end of that epoch; in skipped epochs the last number stays"
    dls,want = labelled(),[]
    class Ask(Callback):
        order = 90
        def after_epoch(self): want.append((float(knn(self.learn, dls, k=5)), float(linear_probe(self.model.encoder, dls, C=.1))))
    learn = fit('swav', [OnlineKNN(dls, k=5), OnlineProbe(dls, every=2, C=.1), Ask()], epochs=5)
    assert learn.recorder.metric_names==['epoch','train_loss','valid_loss','knn','probe','time']
    rows = [o[-2:] for o in learn.recorder.values]
    assert [o[0] for o in rows]==[o[0] for o in want] and max(o[0] for o in rows)>1/3
    assert [o[1] for o in rows]==[want[i][1] for i in (0,0,2,2,4)]
    assert learn.online_knn.history==[[i,o[0]] for i,o in enumerate(want)] and learn.online_probe.history==[[i,want[i][1]] for i in (0,2,4)]
    assert not len(learn.metrics)

def test_from_a_later_epoch():
    "No number before there is one"
    learn = fit('swav', [OnlineProbe(labelled(), every=2)], epochs=4, start_epoch=1)
    accs = [o[-1] for o in learn.recorder.values if len(o)]
    assert math.isnan(accs[0]) and [e for e,_ in learn.online_probe.history]==[2,3] and accs[1:]==[a for _,a in learn.online_probe.history]

def test_statistics_and_precision_are_passed_on():
    dls,kw = labelled(200, classes=8),dict(stats=([.9],[.02]), half=True)
    learn = fit('swav', [OnlineKNN(dls, k=20, temp=1e-4, **kw), OnlineProbe(dls, C=1e-4, **kw)], epochs=1)
    want = [[float(f(learn, dls, **k)) for f,k in ((partial(knn, temp=1e-4), o), (partial(linear_probe, C=1e-4), o))] for o in (kw, {})]
    assert learn.recorder.values[0][-2:]==want[0] and all(a!=b for a,b in zip(*want)) and all(a!=float(f(learn, dls, **kw)) for a,f in zip(want[0], (knn,linear_probe)))

def test_save_model(tmp_path):
    "The encoder that is kept is that of the best epoch"
    dls,states = labelled(),[]
    class Keep(Callback):
        order = 90
        def after_epoch(self): states.append({k:v.clone() for k,v in self.model.state_dict().items()})
    for every in (1,2):
        states.clear()
        learn = fit('swav', [OnlineKNN(dls, every=every, k=5), SaveModelCallback(monitor='knn'), Keep()], epochs=4, path=tmp_path)
        accs = [o[-1] for o in learn.recorder.values]
        best = max(range(4), key=lambda i: (accs[i], -i))
        assert all(torch.equal(v, states[best][k]) for k,v in learn.model.state_dict().items())

def test_second_fit_and_exceptions():
    "A history a fit; and the columns are there once, also after a fit that broke off"
    class Stop(Callback):
        def __init__(self, ex): self.ex = ex
        def after_epoch(self): raise self.ex
    learn = fit('swav', both())
    for ex in (CancelFitException, KeyboardInterrupt): # the second ends without `after_fit`
        try: quiet(learn, 2, cbs=Stop(ex))
        except KeyboardInterrupt: pass
        assert len(learn.online_knn.history)==1
    quiet(learn, 2)
    assert [e for e,_ in learn.online_knn.history]==[0,1] and learn.recorder.metric_names[3:5]==['knn','probe'] and len(learn.recorder.metric_names)==6

@pytest.mark.filterwarnings('ignore:load_learner:UserWarning')
def test_lr_find_and_export(tmp_path):
    "Nothing is judged in `lr_find`, and the run after it is the same; the data does not go into the file"
    def run(cbs):
        set_seed(3)
        learn = learner('swav', tensor_dls(images(), images(12), bs=8, seed=0), model('swav', enc=encoder()), cbs=cbs, path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False); assert not getattr(learn, 'online_knn', learn).__dict__.get('history'); learn.fit(2)
        return learn
    learn = run([OnlineKNN(dls := labelled(2000), k=5), OnlineProbe(dls, max_iter=5)])
    assert_same(trace(run(())), trace(learn))
    history = learn.online_knn.history
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)
    assert learn.online_knn.history is history and len(history)==2
    learn.export('a.pkl')
    assert (tmp_path/'a.pkl').stat().st_size<200_000 and learn.online_knn.labelled is not None # the images are 1 MB
    loaded = load_learner(tmp_path/'a.pkl')
    assert loaded.online_knn.history==learn.online_knn.history
    loaded.dls = learn.dls
    with pytest.raises(ValueError, match='online_knn has no DataLoaders.*set learn.online_knn.labelled'): quiet(loaded, 1)
    for o in (loaded.online_knn, loaded.online_probe): o.labelled = labelled()
    quiet(loaded, 1)

def test_memory_does_not_grow():
    "After every epoch as many numbers are alive as after the second, but for fastai's own records; features would be 6,400"
    counts,dls = [],labelled(400)
    class Count(Callback):
        order = 95
        def after_epoch(self):
            gc.collect()
            counts.append(sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor))
    fit('swav', [OnlineKNN(dls, k=5), OnlineProbe(dls, max_iter=20), Count()], epochs=4)
    assert max(counts[1:])-min(counts[1:]) < 100

def test_resume(tmp_path):
    "The numbers go on where they were, and neither the data nor an argument that may be another comes out of the checkpoint"
    class Stop(Callback):
        def before_train(self):
            if self.epoch==3: raise CancelFitException
    def run(*cbs, every=2, resume=False):
        set_seed(3)
        learn = learner('swav', tensor_dls(images(), images(12), bs=8, seed=0), model('swav', enc=encoder()), cbs=[OnlineKNN(data, every=every, k=5), *cbs])
        if resume: learn.resume('stop')
        quiet(learn, 6, .05)
        return learn
    data = [[*dl] for dl in labelled(300)] # lists of tensors, which a checkpoint could take for state
    whole = run()
    run(Checkpoint(tmp_path, minutes=None, epochs=1), Stop())
    assert max(o.stat().st_size for o in tmp_path.iterdir()) < 100_000 # the images are 150 kB
    data = [[*dl] for dl in labelled(280)]
    again = run(Checkpoint(tmp_path), every=4, resume=True)
    assert again.online_knn.history[:2]==whole.online_knn.history[:2] and [e for e,_ in again.online_knn.history]==[0,2,4,5]
    assert again.online_knn.every==4 and len(again.online_knn.labelled[0][0][0])==8 and sum(len(y) for _,y in again.online_knn.labelled[0])==280
    assert [o[-1] for o in again.recorder.values][:4]==[o[-1] for o in whole.recorder.values][:4]

@pytest.mark.parametrize('cb,msg', [
    (lambda: OnlineKNN(tensor_dls(images(), images(12), bs=8)), 'dls.train has no labels'),
    (lambda: OnlineProbe([[(images(4), torch.arange(4))], [images(4)]]), 'dls.valid has no labels'),
    (lambda: OnlineKNN(labelled(), k=31), 'k=31 neighbours of 30'), (lambda: OnlineKNN([[(images(4), torch.arange(4))]]*2, k=5), 'k=5 neighbours of 4'),
    (lambda: OnlineKNN(labelled(), k=0), 'k=0'), (lambda: OnlineKNN(labelled(), temp=0), 'temp=0'), (lambda: OnlineProbe(labelled(), C=0), 'C=0 must be positive'),
    (lambda: OnlineProbe(labelled(), every=0), 'every=0'), (lambda: OnlineKNN(labelled().train), 'dls is a TensorDL'), (lambda: OnlineKNN(None), 'labelled'),
    (lambda: OnlineKNN(tensor_dls((images(8), torch.arange(8)), bs=4), k=3), 'batches|empty'),
    (lambda: OnlineKNN(labelled(), stats=([.5]*3,[.5]*3)), r'stats are for 3 channel\(s\)'),
    (lambda: OnlineProbe(tensor_dls((images(8, 3), torch.arange(8)), (images(8, 3), torch.arange(8)), bs=4)), '3 channels')])
def test_mistakes_are_found_before_the_first_step(cb, msg):
    steps = []
    class Count(Callback):
        def after_batch(self): steps.append(1)
    with pytest.raises((ValueError,TypeError,RuntimeError), match=msg): fit('swav', [cb(), Count()], epochs=1)
    assert not steps


def run(folder, judged=True):
    "One of two processes"
    set_seed(3)
    dls,own = labelled(200, classes=8),[]
    class Own(Callback):
        def after_train(self): own.append(float(knn(self.learn, dls, k=5)))
    learn = Learner(tensor_dls(images(44), images(12), bs=4, seed=0), model('swav', enc=encoder()), path=folder,
                    cbs=[callback('swav'), *([*both(dls), Own()] if judged else [])])
    if judged and rank(): learn.online_knn.judge = partial(lambda *args, judge=learn.online_knn.judge, **kwargs: judge(*args, **kwargs) and .123, k=5) # each process finds its own number
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(2, .05)
    return {k:v.clone() for k,v in learn.model.state_dict().items()},[list(o) for o in learn.recorder.values],own

def two(folder): return run(folder),run(folder, False)

@pytest.mark.slow
def test_two_processes(tmp_path):
    "The numbers of the first on both, though their batch norms differ; and the same encoder to the bit as without"
    (a,plain_a),(b,plain_b) = on_ranks(two, tmp_path, 2)
    assert a[1]==b[1] and [o[2] for o in a[1]]==a[2]
    for judged,plain in ((a,plain_a), (b,plain_b)):
        assert all(torch.equal(v, plain[0][k]) for k,v in judged[0].items()) and [o[:2] for o in judged[1]]==[o[:2] for o in plain[1]]

def test_all_processes_judge_together():
    "Each makes a part of the features"
    seen,cb = [],OnlineKNN(labelled(), k=5)
    cb.judge = partial(lambda *args, k, temp, **kwargs: seen.append(kwargs) or .5, k=5, temp=.07)
    fit('swav', [cb], epochs=1)
    assert seen==[dict(all_ranks=True)] and cb.history==[[0,.5]]
