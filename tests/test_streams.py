"Streams of images: the batches that their order says, whatever cannot be used left out and counted, and those that would have followed after any interruption"
import gc, io, itertools, shutil, tarfile, time, warnings
from functools import partial
from random import Random

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from PIL import Image

import methods, processes
from methods import quiet
from self_supervised import streams
from self_supervised.checkpoint import Checkpoint
from self_supervised.image_files import open_image
from self_supervised.packed import PackedImages, pack_images
from self_supervised.shards import Sample, open_shards
from self_supervised.stream_order import StreamOrder
from self_supervised.streams import ImageStream, stream_dls
from self_supervised.whole_images import window
from test_shards import write_tar

def png(i, h=20, w=20, kind='png', mode='L', **kwargs):
    f = io.BytesIO()
    a = np.random.default_rng(i).integers(0, 255, (h,w) if mode in ('L','P') else (h,w,len(mode)), dtype=np.uint8)
    Image.fromarray(a, mode if mode=='CMYK' else None).convert(mode).save(f, kind, **kwargs)
    return f.getvalue()

bad = {3:b'', 17:b'a text', 30:png(30)[:80], 41:png(41, 5, 30), 52:png(51, 20+51%7)}   # empty, a text, cut off, tiny; 52 has the bytes of 51

def write(folder, n=100, per=(13,0,37,1,49), wrong=bad):
    "Shards of different sizes; image i is 20 to 26 pixels high and its label i%4"
    folder.mkdir()
    i = 0
    for j,k in enumerate(per):
        write_tar(folder/f'{j}.tar', [(f'{o}.{e}', b) for o in range(i, i+k) for e,b in (('png', wrong.get(o, png(o, 20+o%7))), ('cls', b'%d' % (o%4)))])
        i += k
    assert i==n
    return folder

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return write(tmp_path_factory.mktemp('stream')/'shards')

kw = dict(bs=8, n_in=1, shuffle=16, together=2, seed=3, device='cpu')
label = lambda o: int(o.fields['cls'])

def take(dl, n): return list(itertools.islice(dl, n))
def same(a, b): return all(len(x)==len(y) and all(torch.equal(o.pixels, p.pixels) and torch.equal(o.sizes, p.sizes) if isinstance(o, PackedImages) else torch.equal(o, p) for o,p in zip(x, y)) for x,y in zip(a, b, strict=True))
@pytest.fixture
def quietly():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='pass . of the stream')
        yield

# ---- which images

def by_hand(folder, passes, size=None, max_aspect=3., rank=0, ranks=1):
    "Images and labels in their order, and for each the pass and how many of it were taken"
    samples = [o for s in open_shards(folder) for o in s.samples()]
    order   = StreamOrder([13,0,37,1,49], 3, 16, 2)
    for t in range(passes):
        for k,i in enumerate(order(t, rank, ranks).tolist(), 1):
            if i in bad: continue
            x = open_image(io.BytesIO(samples[i].image), size, 1)
            yield (x if size else window(x, max_aspect, Random(f'3 {t} {i}').random())),i%4,t,k

@pytest.mark.parametrize('size', [None, 12])
@pytest.mark.parametrize('workers', [0, 2, 3])
def test_batches(folder, workers, size, quietly):
    "as the order says, through three passes"
    got  = take(stream_dls(folder, label_func=label, num_workers=workers, size=size, **kw).train.dl, 34)
    want = [o for _,o in zip(range(34*8), by_hand(folder, 3, size))]
    for (x,y),i in zip(got, range(0, 34*8, 8)):
        xs,ys = zip(*(o[:2] for o in want[i:i+8]))
        assert y.tolist()==list(ys)
        if size: assert torch.equal(x, torch.stack(xs).as_subclass(torch.Tensor))
        else: assert torch.equal(x.pixels, pack_images(list(xs)).pixels)

def test_windows_of_long_images(tmp_path):
    "others in each pass"
    write_tar(tmp_path/'a.tar', [(f'{i}.png', png(i, 20, 100)) for i in range(16)])
    xs = [o[0] for o in take(stream_dls(tmp_path/'a.tar', **kw).train.dl, 4)]
    assert all(o.sizes.tolist()==[[20,60]]*8 for o in xs)
    first,second = ({x.as_subclass(torch.Tensor).numpy().tobytes() for b in o for x in b} for o in (xs[:2], xs[2:]))
    assert len(first)==16 and not first & second
    assert take(stream_dls(tmp_path/'a.tar', max_aspect=None, **kw).train.dl, 1)[0][0].sizes.tolist()==[[20,100]]*8

def test_not_shuffled(folder, quietly):
    y = torch.cat([o[1] for o in take(stream_dls(folder, label_func=label, **kw|dict(shuffle=0)).train.dl, 11)])
    assert y.tolist()==[i%4 for i in range(100) if i not in bad][:88]

def test_epochs_are_not_passes(folder, quietly):
    "an epoch is the full batches of a pass, and the next one begins with what is left"
    dls = stream_dls(folder, label_func=label, **kw)
    assert len(dls.train)==100//8 and len(stream_dls(folder, **kw|dict(steps=5)).train)==5
    ys = torch.cat([o[1] for _ in range(3) for o in dls.train]).tolist()
    assert ys==[o[1] for _,o in zip(range(3*12*8), by_hand(folder, 4))]

# ---- what is left out

def skipped(tmp_path, files, **kwargs):
    "What a pass says, and how many images it has"
    write_tar(tmp_path/'a.tar', [(f'{i:03}.{k}', b) for i,(k,b) in enumerate(files)])
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        stream = stream_dls(tmp_path/'a.tar', **{**kw, 'bs':1, 'shuffle':0, **kwargs}).train.dl
        n = next(n for n,_ in enumerate(stream) if stream.turn==1)
    return [str(o.message) for o in ws if 'skipped' in str(o.message)],n

def test_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 5000)
    same,deep = png(1),Image.fromarray(np.full((20,20), 40000, dtype=np.uint16))
    f = io.BytesIO()
    deep.save(f, 'png')
    files = [('png', png(0)), ('png', b''), ('jpg', b'<html>no</html>'), ('png', png(2)[:99]), ('png', png(3, 15, 90)), ('png', png(4, 200, 200)), ('json', b'{}'), ('png', f.getvalue()),
             ('png', same), ('png', same), ('png', same), ('png', png(5)), ('png', same)]
    says,n = skipped(tmp_path, files)
    assert says==['pass 1 of the stream: 9 of 13 images were skipped: 2 broken, 2 twice in a row, 1 empty, 1 tiny, 1 gigantic, 1 without a picture, 1 of more than 8 bits'] and n==4

def test_what_is_taken(tmp_path):
    "pictures of several frames, CMYK, palettes, transparency, JPEG and WebP"
    gif = io.BytesIO()
    ims = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (20,20), dtype=np.uint8)) for i in range(3)]
    ims[0].save(gif, 'gif', save_all=True, append_images=ims[1:])
    files = [('gif', gif.getvalue()), ('jpg', png(0, kind='jpeg', mode='CMYK')), ('png', png(1, mode='RGBA')), ('png', png(2, mode='P')), ('webp', png(3, kind='webp', mode='RGB')), ('jpeg', png(4, kind='jpeg'))]
    says,n = skipped(tmp_path, files, n_in=3)
    assert n==6 and not says

def test_too_much_is_bad(tmp_path):
    files = [('png', b'text' if i%4==0 else png(i)) for i in range(400)]
    with pytest.raises(ValueError, match=r'50 of the first 200 images of this pass cannot be used \(50 broken\), the last: cannot read the image .*; *.*|51 of the first 201') as e: skipped(tmp_path, files)
    assert 'pass max_bad=0.3' in str(e.value) or 'pass max_bad=0.4' in str(e.value)
    says,n = skipped(tmp_path, files, max_bad=.3)
    assert n==300 and 'skipped: 100 broken' in says[0]

def test_all_are_bad(tmp_path):
    write_tar(tmp_path/'a.tar', [(f'{i}.png', b'text %d' % i) for i in range(20)])
    with pytest.raises(ValueError, match=r'none of the 20 images of a pass can be used \(20 broken\)'): take(stream_dls(tmp_path/'a.tar', **kw).train.dl, 1)

def test_none_may_be_bad(folder):
    with pytest.raises(ValueError, match='cannot read the image'): take(stream_dls(folder, skip_bad=False, **kw).train.dl, 12)

def test_counts_in_the_state(folder, quietly):
    stream = stream_dls(folder, **kw).train.dl
    take(stream, 11) # 88 good ones
    hand = list(by_hand(folder, 1))
    ids  = StreamOrder([13,0,37,1,49], 3, 16, 2)(0)[:hand[87][3]]
    assert stream.state_dict()['seen']==stream.state_dict()['at']==len(ids) and sum(stream.state_dict()['bad'].values())==sum(i in bad for i in ids.tolist())

# ---- sources that fail

class Flaky:
    "A shard that fails at an image for the first `times` times"
    name = 'a server'
    def __init__(self, n, at, times, error=ConnectionResetError): self.n,self.at,self.times,self.error,self.opened = n,at,times,error,[]
    def count(self): return self.n
    def samples(self, start=0):
        self.opened.append(start)
        for i in range(start, self.n):
            if i==self.at and self.times:
                self.times -= 1
                raise self.error('it is gone')
            yield Sample(str(i), png(i), {})

@pytest.fixture
def pauses(monkeypatch):
    res = []
    monkeypatch.setattr(time, 'sleep', res.append)
    return res

def test_asks_again(pauses):
    shard = Flaky(40, 21, 3)
    with pytest.warns(UserWarning, match=r'a server could not be read \(ConnectionResetError: it is gone\): trying again in 4 s'): got = take(stream_dls(shard, **kw).train.dl, 5)
    assert same(got, take(stream_dls(Flaky(40, 0, 0), **kw).train.dl, 5)) and pauses==[1,2,4] and shard.opened[:4]==[0,20,20,20]

def test_gives_up(pauses):
    with pytest.warns(UserWarning), pytest.raises(OSError, match='could not be read, not even after 5 more tries .*go on from the last checkpoint'): take(stream_dls(Flaky(40, 21, 99), **kw).train.dl, 5)
    assert pauses==[1,2,4,8,16]

def test_is_not_asked_again_for_what_is_wrong(pauses):
    with pytest.raises(ValueError, match='it is gone'): take(stream_dls(Flaky(40, 21, 99, ValueError), **kw).train.dl, 5)
    assert not pauses

def test_fewer_than_were_said(folder):
    with pytest.raises(ValueError, match='has no image 13, and fewer than .*sizes.json'): take(stream_dls(folder, sizes=[14,0,37,1,49], **kw).train.dl, 13)

# ---- going on

@pytest.mark.parametrize('workers', [0, 3])
def test_from_any_place(folder, workers, quietly):
    "30 batches are two and a half passes"
    stream = stream_dls(folder, label_func=label, num_workers=workers, **kw).train.dl
    whole,states = [],[stream.state_dict()]
    for b in itertools.islice(stream, 30):
        whole.append(b)
        states.append(stream.state_dict())
    for k in range(0, 31, 3):
        again = stream_dls(folder, label_func=label, num_workers=2-workers//2, **kw).train.dl
        again.load_state_dict(states[k])
        assert same(take(again, 30-k), whole[k:])
        assert again.state_dict()==states[-1]

def test_only_its_block_is_read_again(folder):
    "to go on in the last block, no image before it is asked for"
    stream = stream_dls(Flaky(400, 0, 0), **kw).train.dl
    for _ in itertools.islice(stream, 45): pass
    stream.shards[0].opened.clear()
    state = stream.state_dict()
    again = ImageStream(stream.shards, stream.order, 8, stream.decode, 1)
    again.load_state_dict(state)
    take(again, 1)
    first = stream.shards[0].opened[0]
    assert first==min(stream.order.reading(0)[state['at']//16*16:][:16])-1 and first>300 # and the one before, to compare

def part(folder, monkeypatch, rank, ranks, state=None, n=1000):
    "Labels-free names of the images of a process, and its states; as if it were on it"
    monkeypatch.setattr(streams, 'rank', lambda: rank)
    monkeypatch.setattr(streams, 'world_size', lambda: ranks)
    stream = stream_dls(folder, label_func=lambda o: int(o.name.split(' ')[0]), **kw|dict(bs=4)).train.dl
    if state: stream.load_state_dict(state)
    names,states = [],[]
    for _,y in itertools.islice(stream, n):
        names.append(y.tolist())
        states.append(stream.state_dict())
        if stream.turn==2: break
    return names,states

@pytest.mark.parametrize('plan', [[(2,(3,5)), (3,None)], [(3,(1,8,4)), (1,(2,)), (4,None)], [(2,(13,12)), (1,None)], [(1,(7,)), (2,None)]])
def test_other_numbers_of_processes(folder, monkeypatch, plan, quietly):
    "each image of the pass in which they change comes once, and each of the one after it"
    seen,state = [],None
    for ranks,stops in plan:
        parts = [part(folder, monkeypatch, r, ranks, state, 1000 if stops is None else stops[r]) for r in range(ranks)]
        seen += [i for names,_ in parts for b in names for i in b]
        if stops: state = stream_dls(folder, **kw).train.dl.joined([s[-1] for _,s in parts])
    want = {i for i in range(100) if i not in bad}
    counts = {i:seen.count(i) for i in want}
    assert set(seen)==want
    assert min(counts.values())>=2 and max(counts.values())<=3 and sum(v==3 for v in counts.values())<=4*plan[-1][0] # two passes, and the last batches' share of the third

def test_a_process_that_is_ahead(folder):
    "in the next pass already: of the last one it has taken all"
    order = StreamOrder([13,0,37,1,49], 3, 16, 2)
    state = stream_dls(folder, **kw).train.dl.joined([dict(turn=1, at=3, done={}, bad={}, seen=3), dict(turn=0, at=20, done={}, bad={}, seen=20)])
    taken = [order(0, 0, 2), order(0, 1, 2)[:20], *(order(0, r, 3, state['done'][0]) for r in range(3))]
    assert (state['turn'],state['at'])==(0,0) and sorted(np.concatenate(taken).tolist())==list(range(100))
    taken = [order(1, 0, 2)[:3], *(order(1, r, 3, state['done'][1]) for r in range(3))]
    assert sorted(np.concatenate(taken).tolist())==list(range(100))

def test_memory(tmp_path):
    "two blocks and some batches are held, however long the stream is"
    shard,most = Flaky(16*20, 0, 0),0
    for i,_ in enumerate(itertools.islice(stream_dls(shard, **kw).train.dl, 80)):
        if i%8==7: most = max(most, sum(isinstance(o, Sample) for o in gc.get_objects()))
    assert most<=2*16+4*8

# ---- wrong use

@pytest.mark.parametrize('kwargs, error, says', [
    (dict(bs=0), ValueError, 'bs=0'), (dict(bs=101), ValueError, 'pass bs=100 or less'), (dict(shuffle=-1), ValueError, 'shuffle=-1'), (dict(shuffle=.5), ValueError, 'shuffle=0.5'),
    (dict(sizes=[1]), ValueError, 'sizes has 1 numbers, and there are 5 shards'), (dict(sizes=[0]*5), ValueError, 'there is no image in .* 4 other shards'),
    (dict(together=0), ValueError, 'together=0'), (dict(min_side=0), ValueError, 'min_side=0'), (dict(steps=0), ValueError, 'steps=0'), (dict(background='reddish'), ValueError, 'reddish')])
def test_wrong(folder, kwargs, error, says):
    with pytest.raises(error, match=says): stream_dls(folder, **kw|kwargs)

def test_labels_must_be_numbers(folder):
    with pytest.raises(TypeError, match='label_func gives .*a number.*vocab'): take(stream_dls(folder, label_func=lambda o: o.fields['cls'], **kw).train.dl, 1)

def test_fewer_images_than_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, 'world_size', lambda: 8)
    write_tar(tmp_path/'a.tar', [(f'{i}.png', png(i)) for i in range(5)])
    with pytest.raises(ValueError, match='5 images are too few for 8 processes'): stream_dls(tmp_path/'a.tar', steps=3, **kw)

def test_few_shards(folder, monkeypatch):
    monkeypatch.setattr(streams, 'world_size', lambda: 8)
    with pytest.warns(UserWarning, match='5 shards for 8 processes.*32 shards or more'): stream_dls(folder, **kw)

# ---- runs that are killed

class Die(Callback):
    "Raise after the `nth` backward pass"
    is_setting = False
    def __init__(self, nth): self.nth = nth
    def after_backward(self):
        self.nth -= 1
        if not self.nth: raise KeyboardInterrupt

def run_of(folder, source, weights=42, cbs=(), ranks=1, method='swav', **kwargs):
    set_seed(weights)
    dls = stream_dls(source, **{**kw, 'bs':8//ranks, **kwargs})
    return methods.learner(method, dls, m=methods.model(method, enc=methods.small_encoder()), cbs=[Checkpoint(folder, minutes=None, steps=1), *cbs], path=folder)

def outcome(learn): return [*learn.model.state_dict().values(), torch.stack(list(learn.recorder.losses)), torch.tensor([o[0] for o in learn.recorder.values])]

@pytest.mark.parametrize('nth,workers', [(1,0), (8,2), (12,3), (13,0), (30,3)])
def test_goes_on_exactly(folder, tmp_path, nth, workers, quietly):
    "12 batches an epoch: killed in its first, in the middle, in its last, in the first of the next, in the third; and once more when it has gone on"
    quiet(whole := run_of(tmp_path/'whole', folder, num_workers=workers), 3, 1e-2)
    for n in (nth,2):
        dying = run_of(tmp_path/'run', folder, cbs=[Die(n)], num_workers=workers)
        dying.resume(missing_ok=True)
        with pytest.raises(KeyboardInterrupt): quiet(dying, 3, 1e-2)
    again = run_of(tmp_path/'run', folder, weights=7, num_workers=2)
    again.resume(missing_ok=True)
    quiet(again, 3, 1e-2)
    for a,b in zip(outcome(whole), outcome(again), strict=True): assert torch.equal(a, b)

def test_goes_on_after_a_source_was_given_up(tmp_path, pauses):
    "with the batch after the last one that was saved"
    quiet(whole := run_of(tmp_path/'whole', Flaky(64, 0, 0)), 2, 1e-2)
    with pytest.warns(UserWarning, match='trying again'), pytest.raises(OSError, match='go on from the last checkpoint'): quiet(run_of(tmp_path/'run', Flaky(64, 50, 99)), 2, 1e-2)
    again = run_of(tmp_path/'run', Flaky(64, 0, 0), weights=7)
    again.resume()
    quiet(again, 2, 1e-2)
    for a,b in zip(outcome(whole), outcome(again), strict=True): assert torch.equal(a, b)

@pytest.mark.parametrize('kwargs, says', [(dict(seed=4), 'opened.seed: 3 → 4'), (dict(shuffle=20), 'opened.shuffle: 16 → 20'), (dict(together=3), 'opened.together'), (dict(min_side=6), 'opened.min_side'), (dict(max_aspect=2.), 'opened.max_aspect')])
def test_other_settings(folder, tmp_path, kwargs, says, quietly):
    with pytest.raises(KeyboardInterrupt): quiet(run_of(tmp_path, folder, cbs=[Die(3)]), 1)
    other = run_of(tmp_path, folder, **kwargs)
    other.resume()
    with pytest.raises(ValueError, match=says): quiet(other, 1)

def test_other_shards(folder, tmp_path, quietly):
    "a shard more makes another order"
    with pytest.raises(KeyboardInterrupt): quiet(run_of(tmp_path/'run', folder, cbs=[Die(3)], steps=5), 1)
    other = run_of(tmp_path/'run', write(tmp_path/'more', 101, (13,0,37,1,49,1)), steps=5)
    other.resume()
    with pytest.raises(ValueError, match='opened.sizes'): quiet(other, 1)

class Names(Callback):
    "The images of each batch, by their labels"
    is_setting,order = False,-50
    def before_fit(self): self.names = []
    def before_batch(self):
        if self.training: self.names.append(self.yb[0].tolist())

def on_rank(folder, source, ranks, stop, go=False):
    "Names of the images of this process, of the last number of epochs, and the weights"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = run_of(folder/'run', source, cbs=[Names(), *([Die(stop)] if stop else [])], ranks=ranks, label_func=lambda o: int(o.name.split(' ')[0]), steps=12)
        if go: learn.resume(['processes','bs','distributed_trainer.sync_bn'])
        try:
            with learn.distrib_ctx(): quiet(learn, 2, 1e-2)
        except KeyboardInterrupt: pass
    return learn.names.names,{k:v.clone() for k,v in learn.model.state_dict().items()}

@pytest.mark.slow
def test_two_processes_go_on_as_two_and_as_one(folder, tmp_path):
    "weights of an undisturbed run, to the bit; with one process in place of two each image of the pass comes once all the same"
    for d in 'ab': (tmp_path/d).mkdir()
    whole  = processes.on_ranks(partial(on_rank, source=folder, ranks=2, stop=None), tmp_path/'a', 2)
    before = processes.on_ranks(partial(on_rank, source=folder, ranks=2, stop=8), tmp_path/'b', 2)
    shutil.copytree(tmp_path/'b', tmp_path/'c')
    after  = processes.on_ranks(partial(on_rank, source=folder, ranks=2, stop=None, go=True), tmp_path/'b', 2)
    for (names,weights),(again,same) in zip(whole, after):
        assert again[7:]==names[7:] # the first are those of the first process, from the checkpoint
        for k in weights: assert torch.equal(weights[k], same[k])
    names,_ = on_rank(tmp_path/'c', folder, 1, None, go=True)
    assert len(names)==24 # an epoch has its 12 batches all the same
    seen = [i for part,_ in before for b in part[:7] for i in b] + [i for b in names[7:] for i in b]
    assert sorted(seen[:95])==sorted(set(range(100))-set(bad))

# ---- a long one

def write_many(folder, shards, per):
    "Noise of 12×12 pixels"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for j in range(shards):
        with tarfile.open(folder/f'{j:03}.tar', 'w') as tar:
            for i in range(per):
                f = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (12,12), dtype=np.uint8)).save(f, 'png', compress_level=0)
                m = tarfile.TarInfo(f'{i}.png')
                m.size = f.tell()
                f.seek(0)
                tar.addfile(m, f)

def long_run(folder, shards):
    "A pass of SimCLR in batches of 256, saved every 25 steps; what it ends with goes to a file"
    set_seed(42)
    folder.mkdir(exist_ok=True)
    dls = stream_dls(shards, bs=256, n_in=1, min_side=12, num_workers=2, device='cpu')
    enc = torch.nn.Sequential(torch.nn.Conv2d(1,8,3,stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    learn = methods.learner('simclr', dls, m=methods.model('simclr', enc=enc), cb=methods.callback('simclr', methods.augs('simclr', 8)), cbs=[Checkpoint(folder/'run', minutes=None, steps=25)], path=folder)
    learn.resume(missing_ok=True)
    quiet(learn, 1, 1e-3)
    torch.save(learn.model.state_dict(), folder/'end.pt')

@pytest.mark.kill
@pytest.mark.timeout(3600)
def test_two_hundred_thousand_images_and_five_kills(tmp_path):
    "in 200 shards; the weights are those of the undisturbed run"
    write_many(tmp_path/'shards', 200, 1000)
    begin = time.monotonic()
    with processes.start(long_run, tmp_path/'whole', tmp_path/'shards') as p: assert p.wait(1500)==0
    seconds,rng,kills = time.monotonic()-begin,Random(0),0
    while kills<5:
        with processes.start(long_run, tmp_path/'killed', tmp_path/'shards') as p:
            time.sleep(rng.uniform(.05, .18)*seconds)
            assert p.poll() is None, 'it was done before it was killed: the machine is faster now'
            p.kill()
            kills += 1
    with processes.start(long_run, tmp_path/'killed', tmp_path/'shards') as p: assert p.wait(1500)==0
    a,b = (torch.load(tmp_path/o/'end.pt') for o in ('whole','killed'))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
