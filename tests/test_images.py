"What image files hold and which of them are taken: links, transparency, more than 8 bits, bands; and which arguments the loaders of `data` take"
import builtins, os, struct, warnings, zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import (GrandparentSplitter, IntToFloatTensor, Learner, Normalize, RandomSplitter, Resize, TensorImage, accuracy, get_image_files,
                               imagenet_stats, parent_label)
from fastai.callback.core import Callback
from fastprogress import fastprogress
from PIL import Image
from torch import nn

from self_supervised.basics import warn_once
from self_supervised.data import image_dls, tensor_dls
from self_supervised.encoders import encoder_dim
from self_supervised.heads import create_cls_module
from self_supervised.image_files import ImageFileError, check_files, common_depth, image_size, list_images, open_image
from self_supervised.ranges import raw_batches
from self_supervised.vision.simclr import SimCLR, create_simclr_model, get_simclr_aug_pipelines

@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    "Notices are given again; no progress bars"
    warn_once.cache_clear()
    monkeypatch.setattr(fastprogress, 'NO_BAR', True)

def notices(f):
    "What `f()` gives, and what it warns of"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        res = f()
    return res,[str(o.message) for o in w if issubclass(o.category, UserWarning)]

# --- which files

def _tree(top, *names):
    for i,o in enumerate(names):
        (top/o).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8,8), (i,0,0)).save(top/o)
    return top

plain = 'b/2.png','b/10.png','a/z.jpg','a/b/c/x.PNG','top.png','a-b/1.bmp','.hidden/1.png','a/.hid.png'
visible = sorted(o for o in plain if '.hid' not in o)

def _names(fns, top): return [str(o.relative_to(top)) for o in fns]

def test_a_folder_without_links_is_as_before(tmp_path):
    top = _tree(tmp_path/'in', *plain)
    (top/'notes.txt').write_text(''); (top/'noext').write_text(''); (top/'dir.png').mkdir()
    fns,said = notices(lambda: list_images(top))
    assert not said and fns==sorted(get_image_files(top)) and len(fns)==len(visible)
    assert notices(lambda: list_images(str(top)))[0]==fns

@pytest.mark.parametrize('where,to', [('a/up','.'), ('a/b/up','../..'), ('a/own','.')], ids=['to the top','two up','to its own folder'])
def test_a_link_that_leads_back_up(tmp_path, where, to):
    top = _tree(tmp_path/'in', *plain)
    (top/where).symlink_to(top if to=='.' and where=='a/up' else to)
    fns,said = notices(lambda: list_images(top))
    assert _names(fns, top)==[str(o.relative_to(top)) for o in sorted(top/o for o in visible)]
    assert len(said)==1 and 'links to what is there already (1: ' in said[0] and str(top/where) in said[0]

def test_two_links_to_one_folder_outside(tmp_path):
    out,top = _tree(tmp_path/'out', '1.png','sub/2.png'),_tree(tmp_path/'in', 'z/3.png')
    for o in ('b','a'): (top/o).symlink_to(out)
    (top/'c').symlink_to(out/'sub')
    fns,said = notices(lambda: list_images(top))
    assert _names(fns, top)==['a/1.png','a/sub/2.png','z/3.png']
    assert len(said)==1 and 'already (2: ' in said[0] and str(top/'b') in said[0] and str(top/'c') in said[0]

def test_one_link_is_followed_without_a_word(tmp_path):
    top = _tree(tmp_path, 'out/1.png', 'in/z/3.png')/'in'
    (top/'a').symlink_to('../out')
    assert notices(lambda: _names(list_images(top), top))==(['a/1.png','z/3.png'],[])
    link = tmp_path/'whole'; link.symlink_to(top)
    assert notices(lambda: _names(list_images(link), link))==(['a/1.png','z/3.png'],[])

def test_links_to_files(tmp_path):
    store,top = _tree(tmp_path/'store', '1.png','2.png'),_tree(tmp_path/'in', 'b/real.png')
    for nm,to in (('a/x.png',store/'1.png'), ('c/x.png',store/'1.png'), ('a/y.png',store/'2.png'), ('a/r.png',top/'b'/'real.png')):
        (top/nm).parent.mkdir(exist_ok=True); (top/nm).symlink_to(to)
    fns,said = notices(lambda: list_images(top))
    assert _names(fns, top)==['a/x.png','a/y.png','b/real.png'] # the real name rather than a link to it, the first of two links
    assert len(said)==1 and 'links to what is there already (2: ' in said[0] and 'a/r.png' in said[0] and 'c/x.png' in said[0]

def test_links_to_nothing_are_named(tmp_path):
    top = _tree(tmp_path/'in', '1.png')
    (top/'gone.png').symlink_to(tmp_path/'nowhere.png'); (top/'self.png').symlink_to('self.png'); (top/'gone').symlink_to(tmp_path/'nowhere')
    fns,said = notices(lambda: list_images(top))
    assert _names(fns, top)==['1.png'] and len(said)==1 and 'links to nothing (2: ' in said[0] and 'gone.png' in said[0] and 'self.png' in said[0]

def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    top,scandir = _tree(tmp_path/'in', 'a/1.png','b/2.png','b/c/3.png'),os.scandir
    def shut(*names):
        def f(d):
            if Path(d) in [top/o for o in names]: raise PermissionError(13, 'Permission denied', str(d))
            return scandir(d)
        monkeypatch.setattr(os, 'scandir', f)
    shut('b')
    fns,said = notices(lambda: list_images(top))
    assert _names(fns, top)==['a/1.png'] and len(said)==1 and 'folders that cannot be read (1: ' in said[0] and f'{top/"b"}: Permission denied' in said[0]
    shut('')
    with pytest.raises(ValueError, match=f'no image in the folder {top}.*cannot be read.*Permission denied'): list_images(top)

def test_ten_are_named_and_the_rest_counted(tmp_path):
    top = _tree(tmp_path/'in', '1.png')
    for i in range(13): (top/f'l{i:02}.png').symlink_to('1.png')
    said, = notices(lambda: list_images(top))[1]
    assert 'already (13: ' in said and 'l09.png and 3 more' in said and 'l10.png' not in said

# --- transparency

c4 = np.random.default_rng(0).integers(0, 256, (8,9,4), dtype=np.uint8)
c4[:2,...,3],c4[-2:,...,3] = 0,255
grey = np.array([.299,.587,.114])

def _blend(c, a, bg, n_in):
    "What is seen of colours `c` (h,w,1 or 3) of opacity `a` (h,w) in [0,1] before `bg`"
    if c.shape[2]==1: c = c.repeat(3, 2)
    x = a[...,None]*c + (1-a[...,None])*np.array(bg)
    return x.transpose(2,0,1) if n_in==3 else (x@grey)[None]

def _save(mode, fn):
    "An image with transparency in `fn`; its colours and opacity"
    im = Image.fromarray(c4)
    if mode=='RGBA': im.save(fn)
    elif mode=='LA':
        Image.fromarray(c4[...,[0,3]], 'LA').save(fn)
        return c4[...,:1],c4[...,3]/255
    elif mode=='P': # each colour of the palette with an opacity of its own
        im = Image.fromarray(c4[...,0]%16, 'P')
        pal,alpha = np.random.default_rng(1).integers(0, 256, (16,3)),np.arange(16)*17
        im.putpalette(pal.flatten().tolist())
        im.save(fn, transparency=bytes(alpha.tolist()))
        return pal[c4[...,0]%16],alpha[c4[...,0]%16]/255
    elif mode=='P, one colour':
        im = Image.fromarray(c4[...,0]%16, 'P')
        pal = np.random.default_rng(1).integers(0, 256, (16,3))
        im.putpalette(pal.flatten().tolist())
        im.save(fn, transparency=3)
        return pal[c4[...,0]%16],(c4[...,0]%16!=3).astype(float)
    elif mode=='L, one grey':
        a = c4[...,0]//64*64
        Image.fromarray(a).save(fn, transparency=64)
        return a[...,None],(a!=64).astype(float)
    elif mode=='RGB, one colour':
        a = c4[...,:3]//128*128
        Image.fromarray(a).save(fn, transparency=(128,0,128))
        return a,(a!=[128,0,128]).any(2).astype(float)
    return c4[...,:3],c4[...,3]/255

@pytest.mark.parametrize('bg,rgb', [(None,(255,255,255)), ('black',(0,0,0)), ('#ff8000',(255,128,0)), ((10,200,30),(10,200,30))])
@pytest.mark.parametrize('n_in', [1,3])
@pytest.mark.parametrize('mode', ['RGBA','LA','P','P, one colour','L, one grey','RGB, one colour'])
def test_transparency_is_laid_on_the_background(tmp_path, mode, n_in, bg, rgb):
    c,a = _save(mode, tmp_path/'a.png')
    x = open_image(tmp_path/'a.png', None, n_in, **({} if bg is None else dict(background=bg)))
    assert x.dtype==torch.uint8 and np.abs(x.numpy()-_blend(c, a, rgb, n_in)).max()<=1.01

@pytest.mark.parametrize('suffix', ['gif','webp','tif'])
def test_transparency_of_other_formats(tmp_path, suffix):
    im = Image.new('RGBA', (8,8), (200,0,0,255))
    im.paste((0,0,200,0), (0,0,4,8))
    im.save(tmp_path/f'a.{suffix}', **dict(webp=dict(lossless=True)).get(suffix, {}))
    x = open_image(tmp_path/f'a.{suffix}', None)
    assert (x[:,:,:4]==255).all() and (x[:,0,4:].T-torch.tensor([200,0,0])).abs().max()<=1

def test_opaque_pictures_are_as_before(tmp_path):
    Image.fromarray(c4[...,:3]).save(tmp_path/'a.png')
    Image.fromarray(np.dstack([c4[...,:3], np.full((8,9), 255, np.uint8)])).save(tmp_path/'b.png')
    for n_in in (1,3): assert torch.equal(open_image(tmp_path/'a.png', 6, n_in), open_image(tmp_path/'b.png', 6, n_in))

def test_background_in_batches_and_wrong_ones(tmp_path):
    _save('RGBA', tmp_path/'a.png')
    x, = image_dls(tmp_path, size=8, bs=1, background='black', device='cpu').one_batch()
    torch.testing.assert_close(torch.Tensor(x[0]), open_image(tmp_path/'a.png', 8, background='black').as_subclass(torch.Tensor)/255)
    for bad in ('whiet', (1,2), (0,0,256), 7):
        with pytest.raises(ValueError, match='background=.*must be a colour'): open_image(tmp_path/'a.png', background=bad)
        with pytest.raises(ValueError, match='background=.*must be a colour'): image_dls(tmp_path, background=bad)

# --- more than 8 bits a channel

def _png16(fn, a, key=None):
    "A PNG of 16 bits, which Pillow cannot write in colour"
    h,w,c = a.shape
    def chunk(t, d): return struct.pack('>I', len(d))+t+d+struct.pack('>I', zlib.crc32(t+d))
    rows = b''.join(b'\0'+o.astype('>u2').tobytes() for o in a)
    Path(fn).write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 16, {1:0,2:4,3:2,4:6}[c], 0, 0, 0)) +
                         (chunk(b'tRNS', struct.pack(f'>{len(key)}H', *key)) if key else b'') + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))

def _values(c, top, h=8, w=9, dtype=np.uint16):
    a = (np.random.default_rng(c).random((h,w,c))*top).astype(dtype)
    a[0,0] = top
    return a

def _want(u, n_in):
    "Floats (h,w,c) as (n_in,h,w)"
    c = u.shape[2]
    return (u if c==n_in else u.repeat(3, 2) if n_in==3 else u@grey[:,None]).transpose(2,0,1)

@pytest.mark.parametrize('top', [255,1023,4095,16383,65535])
@pytest.mark.parametrize('c', [1,3])
@pytest.mark.parametrize('n_in', [1,3])
def test_png_of_16_bits(tmp_path, c, top, n_in):
    a = _values(c, top)
    _png16(tmp_path/'a.png', a)
    x = open_image(tmp_path/'a.png', None, n_in)
    assert x.dtype==torch.float32 and isinstance(x, TensorImage)
    np.testing.assert_allclose(x.numpy(), _want(a/top, n_in), atol=1e-6)
    np.testing.assert_allclose(open_image(tmp_path/'a.png', None, n_in, max_value=65535).numpy(), _want(a/65535, n_in), atol=1e-6)

@pytest.mark.parametrize('n_in', [1,3])
@pytest.mark.parametrize('c', [2,4])
def test_transparency_of_16_bits(tmp_path, c, n_in):
    a = _values(c, 65535); a[:2,...,-1] = 0
    _png16(tmp_path/'a.png', a)
    for bg,rgb in (('white',(1,1,1)), ((255,0,51),(1,0,.2))):
        x = open_image(tmp_path/'a.png', None, n_in, background=bg)
        np.testing.assert_allclose(x.numpy(), _blend(a[...,:-1]/65535, a[...,-1]/65535, rgb, n_in), atol=1e-6)

@pytest.mark.parametrize('c', [1,3])
def test_a_colour_that_stands_for_transparent_in_16_bits(tmp_path, c):
    a = _values(c, 65535); a[3,4] = range(500, 500+c)
    _png16(tmp_path/'a.png', a, key=range(500, 500+c))
    x = open_image(tmp_path/'a.png', None)
    want = _want(a/65535, 3); want[:,3,4] = 1
    np.testing.assert_allclose(x.numpy(), want, atol=1e-6)

def test_deep_files_are_cut_and_turned_like_others(tmp_path):
    im = Image.fromarray((np.indices((40,60)).sum(0)*2).astype(np.uint8))
    im.save(tmp_path/'a.png')
    ex = Image.Exif(); ex[0x112] = 6
    Image.fromarray(np.asarray(im).astype(np.uint16)*257).save(tmp_path/'b.png')
    Image.fromarray(np.asarray(im).astype(np.uint16)*257).save(tmp_path/'c.png', exif=ex)
    im.save(tmp_path/'d.png', exif=ex)
    def u(nm, **kw): return open_image(tmp_path/nm, (30,20), **kw)
    assert (u('b.png', max_value=65535)-u('a.png')/255).abs().max()<=1.01/255 # Pillow rounds bytes after each of two directions
    assert (u('c.png', max_value=65535)-u('d.png')/255).abs().max()<=1.01/255 and not torch.equal(u('a.png'), u('d.png'))
    assert torch.equal(u('a.png', dtype=torch.float32), u('a.png')/255)

@pytest.mark.parametrize('c', [1,3])
def test_tiff_is_turned_once(tmp_path, c):
    a = _values(c, 4095)
    _tif(tmp_path/'a.tif', a[...,0] if c==1 else a, photometric='minisblack' if c==1 else 'rgb', extratags=[(274, 3, 1, 6, True)])
    np.testing.assert_allclose(open_image(tmp_path/'a.tif', None, c).numpy(), np.rot90(a/4095, -1).transpose(2,0,1), atol=1e-6)

def _tif(fn, a, **kw): pytest.importorskip('tifffile').imwrite(fn, a, **kw)

@pytest.mark.parametrize('n_in', [1,3])
@pytest.mark.parametrize('dtype,top', [('uint16',4095), ('int16',1023), ('uint32',16383), ('int32',65535), ('float32',1), ('float64',1), ('float32',255), ('float16',1)])
def test_grey_tiff(tmp_path, dtype, top, n_in):
    a = _values(1, top, dtype=dtype)
    _tif(tmp_path/'a.tif', a[...,0])
    np.testing.assert_allclose(open_image(tmp_path/'a.tif', None, n_in).numpy(), _want(a.astype(float)/top, n_in), atol=1e-6)

@pytest.mark.parametrize('n_in', [1,3])
@pytest.mark.parametrize('dtype,top', [('uint16',4095), ('int16',1023), ('float32',1)])
@pytest.mark.parametrize('kw', [{}, dict(compression='zlib'), dict(byteorder='>'), dict(planarconfig='separate')], ids=str)
def test_colour_tiff(tmp_path, dtype, top, n_in, kw):
    a = _values(3, top, dtype=dtype)
    _tif(tmp_path/'a.tif', a if 'planarconfig' not in kw else a.transpose(2,0,1), photometric='rgb', **kw)
    np.testing.assert_allclose(open_image(tmp_path/'a.tif', None, n_in).numpy(), _want(a.astype(float)/top, n_in), atol=1e-6)

def test_colour_tiff_with_transparency(tmp_path):
    a = _values(4, 65535); a[:2,...,-1] = 0
    _tif(tmp_path/'a.tif', a, photometric='rgb', extrasamples=['unassalpha'])
    np.testing.assert_allclose(open_image(tmp_path/'a.tif', None).numpy(), _blend(a[...,:3]/65535, a[...,3]/65535, (1,1,1), 3), atol=1e-6)
    _tif(tmp_path/'b.tif', a, photometric='rgb', extrasamples=['assocalpha'])
    with pytest.raises(ValueError, match='b.tif.*unassociated'): open_image(tmp_path/'b.tif')

layouts = dict(pixels=lambda a: (a, dict(photometric='minisblack', planarconfig='contig')), planes=lambda a: (a.transpose(2,0,1), dict(photometric='minisblack', planarconfig='separate')),
               pages=lambda a: (a.transpose(2,0,1), dict(photometric='minisblack')), ImageJ=lambda a: (a.transpose(2,0,1), dict(imagej=True, metadata={'axes':'CYX'})))

@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('c', [2,5,13])
@pytest.mark.parametrize('dtype', ['uint16','uint8','float32'])
def test_bands(tmp_path, layout, c, dtype):
    a = _values(c, {'uint16':4095, 'uint8':255, 'float32':1}[dtype], dtype=dtype)
    b,kw = layouts[layout](a)
    _tif(tmp_path/'a.tif', b, **kw)
    x = open_image(tmp_path/'a.tif', None, n_in=c)
    assert x.dtype==(torch.uint8 if dtype=='uint8' else torch.float32) and x.shape==(c,8,9)
    np.testing.assert_allclose(x.numpy(), (a if dtype=='uint8' else a/a.max()).transpose(2,0,1), atol=1e-6)
    assert open_image(tmp_path/'a.tif', (4,6), n_in=c).shape==(c,4,6)
    (xb,),_ = notices(lambda: image_dls([tmp_path/'a.tif']*2, size=8, n_in=c, bs=2, device='cpu').one_batch())
    assert xb.dtype==torch.float32 and xb.shape==(2,c,8,8) and xb.max()<=1
    with pytest.raises(ValueError, match='a.tif.*bands: pass n_in='): open_image(tmp_path/'a.tif', n_in=c+1 if c!=2 else 4)
    if layout in ('pixels','planes') and c>2:
        with pytest.raises(ValueError, match=f'a.tif.*{c} bands: pass n_in={c}'): open_image(tmp_path/'a.tif')

def test_four_bands_are_not_transparency(tmp_path):
    a = _values(4, 255, dtype='uint8')
    _tif(tmp_path/'a.tif', a, photometric='rgb', extrasamples=['unassalpha'])
    np.testing.assert_array_equal(open_image(tmp_path/'a.tif', None, n_in=4).numpy(), a.transpose(2,0,1))

@pytest.mark.parametrize('dtype', ['uint8','uint16'])
def test_channels_of_a_microscope_in_pages(tmp_path, dtype):
    a = _values(3, 255 if dtype=='uint8' else 4095, dtype=dtype)
    _tif(tmp_path/'a.tif', a.transpose(2,0,1), imagej=True, metadata={'axes':'CYX'})
    x = open_image(tmp_path/'a.tif', None)
    np.testing.assert_allclose(x.numpy(), (a if dtype=='uint8' else a/4095).transpose(2,0,1), atol=1e-6)
    _tif(tmp_path/'z.tif', a.transpose(2,0,1), imagej=True, metadata={'axes':'ZYX'}) # a stack: its first picture
    np.testing.assert_allclose(open_image(tmp_path/'z.tif', None, 1, max_value=4095).numpy()[0], a[...,0]/(1 if dtype=='uint8' else 4095), atol=1e-6)

@pytest.mark.parametrize('a,kw,msg', [
    (np.full((8,8), -1, np.int16),      {}, 'values down to -1'),
    (np.full((8,8), np.nan, np.float32),{}, 'NaN or infinite'),
    (np.full((8,8), 70000, np.int32),   {}, 'more than 16 bits.*max_value=70000'),
    (np.full((8,8), 300, np.uint16),    dict(photometric='miniswhite'), 'white is 0'),
    (np.full((8,8), 300, np.uint16),    dict(max_value=255), 'values up to 300, more than max_value=255.*max_value=1023'),
    (np.full((8,8), .5, np.float32),    dict(max_value=4095), 'floats up to 0.5, nearly black'),
])
def test_values_that_mean_nothing_are_refused(tmp_path, a, kw, msg):
    top = kw.pop('max_value', None)
    _tif(tmp_path/'a.tif', a, **kw)
    with pytest.raises(ValueError, match=f'a.tif.*{msg}'): open_image(tmp_path/'a.tif', max_value=top)

def test_other_formats_of_more_than_8_bits(tmp_path):
    a = _values(1, 65535)[...,0]
    Image.fromarray(a.astype(np.int32)).save(tmp_path/'a.pgm')
    np.testing.assert_allclose(open_image(tmp_path/'a.pgm', None, 1).numpy()[0], a/65535, atol=1e-6)

def test_without_tifffile_the_extra_is_named(tmp_path, monkeypatch):
    _tif(tmp_path/'a.tif', _values(3, 4095), photometric='rgb')
    Image.fromarray(_values(1, 4095)[...,0]).save(tmp_path/'b.tif')
    real = builtins.__import__
    def gone(nm, *args, **kw):
        if nm=='tifffile': raise ImportError(nm)
        return real(nm, *args, **kw)
    monkeypatch.setattr(builtins, '__import__', gone)
    for f in (open_image, partial(image_dls, tmp_path), partial(image_dls, tmp_path, skip_bad=True)):
        with pytest.raises(ImportError, match=r"tifffile.*pip install 'self_supervised\[tiff\]'"): f(tmp_path/'a.tif') if f is open_image else f(bs=1)
    assert open_image(tmp_path/'b.tif', None, 1).max()==1 # Pillow is enough for grey

# --- one way for all files of a folder

def _grey16(fn, top): Image.fromarray(np.full((8,8), top, np.uint16)).save(fn)
def _grey8(fn, v=255): Image.fromarray(np.full((8,8), v, np.uint8)).save(fn)

def test_a_folder_of_8_bits_gives_bytes_without_a_word(tmp_path):
    for i in range(4): _grey8(tmp_path/f'{i}.png')
    dls,said = notices(lambda: image_dls(tmp_path, size=8, bs=2, device='cpu'))
    with raw_batches(dls.train): x, = dls.one_batch()
    assert not said and x.dtype==torch.uint8

def test_a_folder_of_several_depths(tmp_path):
    for i,v in enumerate((100,3000,2000)): _grey16(tmp_path/f'{i}.png', v)
    _grey8(tmp_path/'8.png', 51)
    dls,said = notices(lambda: image_dls(tmp_path, size=8, bs=4, n_in=1, shuffle=False, device='cpu'))
    assert len(said)==1 and '3 of the 4 images' in said[0] and 'values up to 3000' in said[0] and '4095 is taken for white' in said[0] and 'max_value' in said[0]
    for raw in (False,True): # a method gets the same floats
        with raw_batches(dls.train) if raw else warnings.catch_warnings(): x, = dls.one_batch()
        torch.testing.assert_close(torch.Tensor(x[:,0,0,0]), torch.tensor([100/4095,3000/4095,2000/4095,.2]))
    dls,said = notices(lambda: image_dls(tmp_path, size=8, bs=4, n_in=1, shuffle=False, max_value=10000, device='cpu'))
    assert not said
    torch.testing.assert_close(torch.Tensor(dls.one_batch()[0][:,0,0,0]), torch.tensor([.01,.3,.2,.2]))

@pytest.mark.parametrize('first,odd,msg', [(None,3000,'odd.png.*more than 8 bits.*max_value=4095'), (900,3000,'odd.png.*values up to 3000, more than max_value=1023.*max_value=4095')])
def test_a_file_that_does_not_fit_is_refused(tmp_path, first, odd, msg):
    _grey8(tmp_path/'a.png') if first is None else _grey16(tmp_path/'a.png', first)
    _grey16(tmp_path/'odd.png', odd)
    fns = [tmp_path/'a.png',tmp_path/'odd.png',*[tmp_path/'a.png']*128] # the second of 130 is not among the 64 looked at
    dls,_ = notices(lambda: image_dls(fns, size=8, bs=2, shuffle=False, device='cpu'))
    with pytest.raises(ValueError, match=msg): dls.one_batch()
    assert notices(lambda: image_dls(fns, size=8, bs=2, shuffle=False, device='cpu', skip_bad=True).one_batch())[0][0].dtype==torch.float32 # all are looked at

def test_floats_among_numbers_of_a_sensor_are_refused(tmp_path):
    _tif(tmp_path/'a.tif', np.full((8,8), 3000, np.uint16)); _tif(tmp_path/'b.tif', np.full((8,8), .5, np.float32))
    dls,_ = notices(lambda: image_dls(tmp_path, size=8, bs=2, device='cpu'))
    with pytest.raises(ValueError, match='b.tif.*nearly black.*one range'): dls.one_batch()

def test_depth_is_looked_at_evenly_and_wrong_values_refused(tmp_path):
    _grey8(tmp_path/'a.png'); _grey16(tmp_path/'b.png', 5000)
    fns = [tmp_path/'a.png']*199+[tmp_path/'b.png']
    assert common_depth(fns)==dict(dtype=torch.uint8)
    assert notices(lambda: common_depth(fns[::-1]))[0]==dict(dtype=torch.float32, max_value=16383)
    for bad in (0,-1):
        with pytest.raises(ValueError, match=f'max_value={bad}'): image_dls(fns, max_value=bad)
    (tmp_path/'c.png').write_text('no image')
    with pytest.raises(ValueError, match='cannot read any of the 1 images.*c.png'): image_dls([tmp_path/'c.png'], bs=1)

# --- arguments

@pytest.fixture
def folder(tmp_path):
    "12 training and 6 validation images in two classes, of three patients each; image i is filled with i"
    for i in range(18):
        d = tmp_path/('train' if i<12 else 'valid')/'ab'[i%2]
        d.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20,20), (i,i,i)).save(d/f'{i:02}_patient{i//3}.png')
    return tmp_path

dls_of  = partial(image_dls, size=8, bs=4, device='cpu')
dls_ten = partial(tensor_dls, torch.arange(40, dtype=torch.uint8).view(40,1,1,1).expand(40,3,8,8), bs=8, device='cpu')

def _numbers(dl): return [(b[0][:,0,0,0]*255).round().int().tolist() for b in dl]

@pytest.mark.parametrize('kw,msg', [
    (dict(vaild_pct=.5), 'vaild_pct: did you mean valid_pct'), (dict(item_tfm=[]), 'did you mean item_tfms'), (dict(weights=[1]*18), 'does not take weights'), (dict(anything=1), 'anything: it takes background, batch_tfms'),
    (dict(labels=[1]), 'labels: label_func'), (dict(after_bach=[]), 'did you mean after_batch'), (dict(num_worker=1), 'did you mean num_workers'), (dict(get_y=parent_label), 'does not take get_y'),
    (dict(val_anything=3), 'does not take val_anything'), (dict(dataset=3), 'does not take dataset'), (dict(dl_type=3), 'does not take dl_type'),
])
def test_image_dls_refuses_what_nobody_takes(folder, kw, msg):
    with pytest.raises(TypeError, match=msg): dls_of(folder, **kw)

@pytest.mark.parametrize('kw,msg', [
    (dict(labels=torch.arange(40)), 'labels: they go with the images'), (dict(valid_pct=.5), 'as valid'), (dict(shufle=False), 'did you mean shuffle'), (dict(anything=1), 'does not take anything: it takes batch_tfms'),
    (dict(item_tfms=[Resize(4)]), 'item_tfms: images are fetched by the batch: pass batch_tfms'), (dict(after_item=[Resize(4)]), 'pass batch_tfms'), (dict(splitter=RandomSplitter()), 'does not take splitter'),
    (dict(path='x'), 'does not take path'), (dict(val_shuffle=True), 'does not take val_shuffle'), (dict(weights=[1]), 'does not take weights'),
])
def test_tensor_dls_refuses_what_nobody_takes(kw, msg):
    with pytest.raises(TypeError, match=msg): dls_ten(**kw)

def test_keywords_of_loaders_are_honoured(folder):
    seen = []
    kw = dict(shuffle=False, val_bs=5, batch_tfms=[lambda b: (seen.append('tfm'), b)[1]], after_batch=lambda b: (seen.append('after'), b)[1])
    for dls,n in ((dls_of(folder/'train', valid=folder/'valid', **kw),12), (dls_ten(valid=torch.rand(12,3,8,8), **kw),40)):
        assert dls.train.bs in (4,8) and dls.valid.bs==5 and not dls.train.shuffle
        got = _numbers(dls.train)
        assert len(sum(got, []))==n and _numbers(dls.train)==got and {'tfm','after'}<=set(seen)
    assert _numbers(dls_ten(shuffle=False).train)==[list(range(i, i+8)) for i in range(0, 40, 8)]
    assert dls_ten(batch_size=10).train.bs==10 and dls_of(folder, batch_size=3).train.bs==3
    assert dls_of(folder, pin_memory=False, path=folder).path==folder and dls_ten(num_workers=0, n=8).train.n==8
    with pytest.raises(ValueError, match='bs=8.*4 training images'): dls_ten(n=4)
    with pytest.raises(ValueError, match='bs=50.*40 training'):      dls_ten(batch_size=50)

def test_after_item_and_item_tfms(folder):
    assert dls_of(folder, after_item=lambda o: o[:,:3]).one_batch()[0].shape==(4,3,3,8)
    for n_in in (1,3):
        x,y = image_dls(folder, parent_label, n_in=n_in, bs=4, device='cpu', item_tfms=Resize(4)).one_batch() # the whole picture comes to Resize
        assert x.shape==(4,n_in,4,4) and x.dtype==torch.float32
    assert image_dls(folder, bs=4, device='cpu', item_tfms=[lambda o: o.rotate(90) if isinstance(o, Image.Image) else o]).one_batch()[0].shape==(4,3,20,20)
    assert dls_of(folder, item_tfms=[lambda o: o.resize((6,5)) if o.size==(8,8) else 1/0]).one_batch()[0].shape==(4,3,5,6) # a size that is given comes first
    with pytest.raises(ValueError, match='item_tfms.*max_value'): dls_of(folder, item_tfms=Resize(4), max_value=255)
    assert image_dls(folder, bs=4, device='cpu').one_batch()[0].sizes.tolist()==[[20,20]]*4 # without either, images stay whole

def test_item_tfms_refuse_deep_files(tmp_path):
    _grey16(tmp_path/'a.png', 3000)
    with pytest.raises(ValueError, match='more than 8 bits'): image_dls(tmp_path, bs=1, item_tfms=Resize(4)).one_batch()

# --- which images are for validation

def _parts(dls): return [[o.relative_to(o.parents[2]).as_posix() for o in d.items] for d in (dls.train_ds,dls.valid_ds)]

def test_folders_of_their_own(folder):
    trn,val = _parts(dls_of(folder/'train', parent_label, valid=folder/'valid'))
    assert len(trn)==12 and len(val)==6 and all(o.startswith('train/') for o in trn) and all(o.startswith('valid/') for o in val)
    assert _parts(dls_of(folder/'train', parent_label, valid=list_images(folder/'valid')))==[trn,val]
    assert _parts(dls_of(folder, parent_label, splitter=GrandparentSplitter()))==[trn,val]
    dls = dls_of(folder/'train', parent_label, valid=folder/'valid')
    assert [o for _,y in dls.valid for o in y.tolist()]==[dls.vocab.o2i[o.split('/')[1]] for o in val]

def test_a_class_of_validation_only_is_refused(folder):
    (folder/'valid'/'new').mkdir(); Image.new('RGB', (8,8)).save(folder/'valid'/'new'/'1.png')
    for kw in (dict(source=folder/'train', valid=folder/'valid'), dict(source=folder, splitter=GrandparentSplitter())):
        with pytest.raises(ValueError, match='only validation images have the class new'): dls_of(label_func=parent_label, **kw)
    assert len(dls_of(folder/'train', valid=folder/'valid').valid_ds)==7 # without labels there is nothing to mistake
    (folder/'train'/'more').mkdir(); Image.new('RGB', (8,8)).save(folder/'train'/'more'/'1.png')
    assert dls_of(folder/'train', parent_label, valid=folder/'valid'/'a').vocab==['a','b','more'] # the classes are those of training

def test_images_on_both_sides_are_refused(folder):
    with pytest.raises(ValueError, match='6 images would be in training and in validation, such as .*valid/a'): dls_of(folder, valid=folder/'valid')
    with pytest.raises(ValueError, match='1 image would be'): dls_of(folder, splitter=lambda o: (range(10),range(9, 18)))

@pytest.mark.parametrize('kw', [dict(valid_pct=.2, valid='valid'), dict(valid_pct=.2, splitter=RandomSplitter()), dict(valid='valid', splitter=RandomSplitter())])
def test_one_way_to_split(folder, kw):
    with pytest.raises(ValueError, match='valid_pct, valid and splitter'): dls_of(folder/'train', **{k:folder/v if k=='valid' else v for k,v in kw.items()})

def test_splitters(folder):
    trn,val = _parts(dls_of(folder, splitter=RandomSplitter(.5, seed=1)))
    assert len(trn)==len(val)==9 and not set(trn) & set(val)
    dls,said = notices(lambda: dls_of(folder, splitter=lambda o: (list(range(8)),[9,10])))
    assert len(dls.train_ds)==8 and len(dls.valid_ds)==2 and any('leaves out 8 of 18' in o for o in said)
    with pytest.raises(ValueError, match='splitter gives 3 lists'): dls_of(folder, splitter=lambda o: ([0],[1],[2]))
    with pytest.raises(ValueError, match='no training images'):     dls_of(folder, splitter=lambda o: ([],range(18)))

def _patient(fn): return fn.stem.split('_')[1]

@pytest.mark.parametrize('valid_pct', [.05,.2,.34,.5,.9])
def test_groups_are_never_torn(folder, valid_pct):
    for seed in range(8):
        trn,val = _parts(dls_of(folder, groups=_patient, valid_pct=valid_pct, seed=seed, bs=1))
        assert not {_patient(Path(o)) for o in trn} & {_patient(Path(o)) for o in val} and len(trn)+len(val)==18
        assert trn and val and abs(len(val)-18*valid_pct)<=3
    assert len({tuple(_parts(dls_of(folder, groups=_patient, valid_pct=.3, seed=o))[1]) for o in range(8)})>3

def test_groups_of_other_splits(folder):
    assert dls_of(folder/'train', valid=folder/'valid', groups=_patient)
    for kw in (dict(valid=folder/'valid'), dict(splitter=lambda o: (range(6),range(6, 12)))):
        with pytest.raises(ValueError, match='1 group would be in training and in validation, such as x'): dls_of(folder/'train', groups=lambda o: 'x', **kw)
    with pytest.raises(ValueError, match='in one group, .x.'): dls_of(folder, groups=lambda o: 'x', valid_pct=.2)
    with pytest.raises(ValueError, match='groups says.*valid_pct, valid or splitter'): dls_of(folder, groups=_patient)

def test_a_share_of_nothing_is_refused(folder):
    with pytest.raises(ValueError, match='valid_pct=0.05 of 18 images is none: pass at least 0.056'): dls_of(folder, valid_pct=.05)

# --- from folder to classifier

def _encoder(): return nn.Sequential(nn.Conv2d(3,4,3,2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

class Seen(Callback):
    "The images that came to the model"
    order = 70
    def before_fit(self): self.types,self.range = set(),[9,-9]
    def before_batch(self):
        x = self.x[0] if isinstance(self.x, (list,tuple)) else self.x
        self.types.add(x.dtype); self.range = [min(self.range[0], x.min().item()),max(self.range[1], x.max().item())]

def test_from_folder_to_classifier(folder):
    "README's lines"
    dls     = image_dls(folder/'train', size=16, bs=4, device='cpu')
    encoder = _encoder()
    augs    = get_simclr_aug_pipelines(12, stats=None)
    learn   = Learner(dls, create_simclr_model(encoder, 8, 4), cbs=SimCLR(augs))
    with learn.no_logging(): learn.fit(1)
    labelled_dls = image_dls(folder/'train', label_func=parent_label, valid_pct=.25, size=16, bs=4, device='cpu')
    classifier = nn.Sequential(encoder, create_cls_module(encoder_dim(encoder), n_out=2))
    learn = Learner(labelled_dls, classifier, metrics=accuracy, cbs=Seen())
    with learn.no_logging(): learn.fit(1)
    assert learn.seen.types=={torch.float32} and 0<=learn.seen.range[0]<learn.seen.range[1]<=1 and len(learn.recorder.values[0])==3
    p,y = learn.get_preds()
    assert p.shape==(3,2) and len(y)==3
    assert learn.predict(folder/'train'/'a'/'00_patient0.png')[0] in ('a','b')
    assert learn.get_preds(dl=learn.dls.test_dl(list_images(folder/'valid')))[0].shape==(6,2)

def test_a_method_leaves_its_loaders_to_a_classifier(folder):
    dls,encoder = image_dls(folder/'train', parent_label, valid=folder/'valid', size=16, bs=4, device='cpu'),_encoder()
    learn = Learner(dls, create_simclr_model(encoder, 8, 4), cbs=SimCLR(get_simclr_aug_pipelines(12, stats=None)))
    with learn.no_logging(): learn.fit(1)
    learn.remove_cb(SimCLR)
    learn.model = nn.Sequential(encoder, nn.Linear(4, 2)); learn.create_opt()
    learn.add_cbs([Seen()])
    with learn.no_logging(): learn.fit(1)
    assert learn.seen.types=={torch.float32} and learn.seen.range[1]<=1
    for dl in learn.dls: assert dl.one_batch()[0].dtype==torch.float32

def test_normalize_comes_after_unit_floats_and_shows_pictures(folder):
    import matplotlib.pyplot as plt
    norm = Normalize.from_stats(*imagenet_stats, cuda=False)
    plain = dls_of(folder, parent_label, shuffle=False).one_batch()[0]
    m,s = (torch.tensor(o)[:,None,None] for o in imagenet_stats)
    for kw in (dict(batch_tfms=norm), dict(after_batch=[norm]), dict(after_batch=[norm,IntToFloatTensor()]), dict(batch_tfms=IntToFloatTensor(), after_batch=norm)):
        dls = dls_of(folder, parent_label, shuffle=False, **kw)
        torch.testing.assert_close(torch.Tensor(dls.one_batch()[0]), (torch.Tensor(plain)-m)/s)
    dls.show_batch(max_n=2)
    a = plt.gcf().axes[0].images[0].get_array(); plt.close('all')
    assert a.shape==(8,8,3) and a.min()>=0

class ViewRanges(Callback):
    "The range of the first views of each batch"
    order,ranges = 100,[]
    def before_fit(self): self.ranges.clear()
    def before_batch(self): self.ranges.append([o.item() for o in self.xb[0][0].aminmax()])

@pytest.mark.parametrize('kind', ['folder','bytes','floats'])
def test_a_method_undoes_normalisation(folder, kind):
    kw = dict(batch_tfms=Normalize.from_stats(*imagenet_stats, cuda=False))
    dls = image_dls(folder/'train', size=16, bs=4, device='cpu', **kw) if kind=='folder' else tensor_dls(
        torch.rand(12,3,16,16) if kind=='floats' else torch.randint(0, 256, (12,3,16,16), dtype=torch.uint8), bs=4, device='cpu', **kw)
    learn = Learner(dls, create_simclr_model(_encoder(), 8, 4), cbs=[SimCLR(get_simclr_aug_pipelines(12, stats=None)), ViewRanges()])
    with pytest.warns(UserWarning, match='Normalize of dls.train is undone'), learn.no_logging(): learn.fit(1)
    assert len(ViewRanges.ranges)==3 and all(-1e-5<=lo<hi<=1+1e-5 for lo,hi in ViewRanges.ranges)

# --- not every failure is damage

def _files(top, n=3):
    for i in range(n): Image.new('RGB', (8,8), (i,0,0)).save(top/f'{i}.png')
    return [top/f'{i}.png' for i in range(n)]

@pytest.mark.parametrize('source,msg', [
    (None,                     'source=None must be a folder or a list'),
    (7,                        'source=7 must be a folder or a list'),
    (b'photos',                "source=b'photos' must be a folder or a list"),
    ({'a.png':0},              r'must be a folder or a list.*in an order: pass sorted'),
    ({'a.png'},                r'must be a folder or a list.*in an order: pass sorted'),
    (['a.png', 3],             "source has int '3' at position 1.*leave out what has none"),
    (['a.png', b'b.png'],      'source has bytes .* at position 1'),
    (['a.png', None],          "source has NoneType 'None' at position 1"),
    (['a.png', float('nan')],  "source has float 'nan' at position 1"),
    (['a.png', ''],            "source has str '' at position 1"),
    ([('a.png',0)],            'source has tuple .* at position 0'),
    (torch.zeros(2,3,8,8),     'source has Tensor .* at position 0.*in memory are for tensor_dls'),
    (np.zeros((2,8,8,3)),      'source has ndarray .* at position 0.*in memory are for tensor_dls'),
    (range(3),                 'source has int .* at position 0'),
], ids=range(14))
def test_what_is_no_list_of_files(source, msg):
    for f in (list_images, image_dls):
        with pytest.raises(TypeError, match=msg): f(source)

def test_tables(tmp_path):
    "A column is a list of files, a table is not"
    import pandas as pd
    fns = _files(tmp_path)
    df  = pd.DataFrame(dict(path=[str(o) for o in fns], label=[0,1,0]))
    assert list_images(df.path)==list_images(np.array(df.path))==list_images(iter(fns))==fns
    with pytest.raises(TypeError, match=r"source is a data frame: pass the column that holds the files, such as df\['path'\]"): image_dls(df)

def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _files(tmp_path)
    with pytest.raises(ValueError, match="source='' is empty: pass a folder; '.' is the current one"): list_images('')
    assert len(list_images('.'))==3
    with pytest.raises(ValueError, match=r"source='\*.png' is not a folder.*glob.glob\('\*.png'\)"): list_images('*.png')

def test_home_in_a_list(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    fns = _files(tmp_path)
    assert list_images(['~/0.png', Path('~')/'1.png', fns[2]])==fns and list_images('~')==fns
    assert image_dls(['~/0.png'], size=8, bs=1, device='cpu').one_batch()[0].shape==(1,3,8,8)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'~nobody-of-this-name').mkdir() # a folder that is called so
    assert list_images(['~nobody-of-this-name/a.png'])==[Path('~nobody-of-this-name/a.png')]

def test_a_missing_file_is_told_when_the_loaders_are_made(tmp_path, monkeypatch):
    fns = _files(tmp_path)
    gone = tmp_path/'gone.png'
    link = tmp_path/'link.png'; link.symlink_to(gone)
    for bad in (gone, link):
        with pytest.raises(ImageFileError, match=f'1 of 4 files cannot be read, the first: {bad} .there is no such file.: correct the list, or pass skip_bad=True'):
            image_dls([*fns, bad], size=8, bs=2)
        with pytest.raises(ImageFileError, match=f'cannot read the image {bad} .there is no such file.: correct the list'): open_image(bad)
    with pytest.raises(ImageFileError, match='1 of 4 files.*gone.png'): image_dls(fns, valid=[gone], size=8, bs=2)
    dls,said = notices(lambda: image_dls([*fns, gone], size=8, bs=3, skip_bad=True, device='cpu'))
    assert list(dls.train_ds.items)==fns and 'gone.png (there is no such file)' in said[0]
    monkeypatch.chdir(tmp_path)
    dls = image_dls(['0.png','1.png'], size=8, bs=2, device='cpu', num_workers=0)
    assert dls.one_batch()[0].shape==(2,3,8,8)
    (tmp_path/'elsewhere').mkdir(); monkeypatch.chdir(tmp_path/'elsewhere')
    with pytest.raises(ImageFileError, match=f'no such file, seen from the current folder {tmp_path}/elsewhere.: pass absolute paths'): dls.one_batch()

def test_a_sample_of_very_many_is_asked_for(tmp_path, monkeypatch):
    fns,asked = _files(tmp_path, 1),[]
    monkeypatch.setattr(os.path, 'isfile', lambda o: asked.append(o) or True)
    check_files(fns*25_000)
    check_files(fns*99)
    assert len(asked)==10_000+99
    asked.clear(); check_files(list(range(100)), n=10)
    assert asked==list(range(0,100,10))

def test_a_folder_in_a_list(tmp_path):
    with pytest.raises(ImageFileError, match='it is a folder.: pass a folder alone, as the source'): image_dls([*_files(tmp_path), tmp_path], size=8, bs=2)
    with pytest.raises(ImageFileError, match='it is a folder'): open_image(tmp_path)

def test_the_system_does_not_give_a_file(tmp_path, monkeypatch):
    fn = _files(tmp_path, 1)[0]
    for e,says in ((PermissionError(13,'Permission denied'),'Permission denied'), (OSError(24,'Too many open files'),'Too many open files.*ulimit -n'), (OSError(5,'Input/output error'),'Input/output error.*the disk')):
        with monkeypatch.context() as m:
            m.setattr(builtins, 'open', lambda *a, **k: (_ for _ in ()).throw(e))
            with pytest.raises(ImageFileError, match=says) as info: open_image(fn)
        assert 'mend or delete' not in str(info.value)

def test_the_pixel_limit_of_pillow(tmp_path, monkeypatch):
    "Above it there is no alarm, and from its double on an error that is not about damage"
    from importlib.util import module_from_spec, spec_from_file_location
    from self_supervised import image_files as used
    Image.new('RGB', (40,30)).save(tmp_path/'large.png')
    with warnings.catch_warnings():
        warnings.resetwarnings(); warnings.simplefilter('error')
        spec = spec_from_file_location('self_supervised.image_files_again', used.__file__) # imported again, as pytest forgets filters
        image_files = module_from_spec(spec); spec.loader.exec_module(image_files)
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
        assert image_files.open_image(tmp_path/'large.png', 8).shape==(3,8,8)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 500)
    for f in (image_files.open_image, lambda o: image_files.good_images([o], 1)):
        with pytest.raises(ValueError, match='it has more than 1,000 pixels, a limit of Pillow') as info: f(tmp_path/'large.png')
        assert 'mend or delete' not in str(info.value)
    with pytest.raises(ValueError, match='make it smaller, or lift the limit.*MAX_IMAGE_PIXELS = None.*skip_bad=True'): image_files.open_image(tmp_path/'large.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert image_files.open_image(tmp_path/'large.png', 8).shape==(3,8,8)

@pytest.mark.parametrize('b,says', [
    (b'',                                                'it is empty.: fetch it again'),
    (b'<?xml version="1.0"?>\n<svg width="8"/>',         'drawing without pixels .SVG..: save it as PNG'),
    (b'\n<!DOCTYPE svg PUBLIC "-//W3C">',                'drawing without pixels .SVG..: save it as PNG'),
    (b'<!DOCTYPE html><title>404</title>',               'a web page.*: fetch the picture again'),
    (b'version https://git-lfs.github.com/spec/v1\n',    'Git LFS.: `git lfs pull`'),
    (b'\0\0\0\x18ftypheic\0\0\0\0mif1heic',              'HEIC, JPEG XL or a film.*: save it as JPEG'),
    (b'\xff\x0a'+bytes(30),                              'HEIC, JPEG XL or a film.*: save it as JPEG'),
    (b'\0\0\0\x0cJXL \r\n\x87\n',                        'HEIC, JPEG XL or a film.*: save it as JPEG'),
    (b'GARBAGE'*9,                                       'UnidentifiedImageError.*: mend or delete it'),
], ids=range(9))
def test_files_that_are_no_pictures(tmp_path, b, says):
    (tmp_path/'a.png').write_bytes(b)
    with pytest.raises(ImageFileError, match=f'cannot read the image {tmp_path}/a.png .*{says}.*, or pass skip_bad=True to image_dls$') as info: open_image(tmp_path/'a.png')
    assert b[:1]==b'G' or 'mend' not in str(info.value)
    with pytest.raises(ImageFileError, match=f'cannot read any of the 1 images looked at.*{says}'): image_dls([tmp_path/'a.png'], bs=1)

def test_what_pillow_does_not_read_is_left_out_and_named(tmp_path):
    fns = _files(tmp_path)
    for o in ('logo.svg','IMG_1.HEIC','raw.nef','raw.CR3','raw.dng','a.jxl','m.emf'): (tmp_path/o).write_text('<svg/>')
    (tmp_path/'notes.txt').touch()
    found,said = notices(lambda: list_images(tmp_path))
    assert found==fns and len(said)==1 and 'does not read, save photographs among them as JPEG (7: ' in said[0] and 'notes' not in said[0]
    assert image_dls(tmp_path, size=8, bs=3, device='cpu').one_batch()[0].shape==(3,3,8,8)
    for o in fns: o.unlink()
    with pytest.raises(ValueError, match='no image in the folder.*Left out: files that Pillow does not read.*IMG_1.HEIC'): list_images(tmp_path)

def test_what_pillow_has_learned_is_read(tmp_path, monkeypatch):
    "pillow-heif registers its extensions like this"
    Image.init()
    monkeypatch.setitem(Image.EXTENSION, '.heic', 'PNG')
    Image.new('RGB', (8,8)).save(tmp_path/'a.heic', 'PNG')
    assert notices(lambda: list_images(tmp_path))==([tmp_path/'a.heic'],[])

@pytest.mark.parametrize('suffix', sorted({'.jpg','.jpeg','.png','.bmp','.gif','.tif','.tiff','.webp','.ppm','.jp2','.avif'}))
def test_common_kinds_are_listed_and_read(tmp_path, suffix):
    try: Image.new('RGB', (16,16), 'red').save(tmp_path/f'a{suffix}')
    except (KeyError, OSError): pytest.skip(f'this Pillow writes no {suffix}')
    assert open_image(list_images(tmp_path)[0], 8).shape==(3,8,8)

def test_numbers_of_numpy(tmp_path):
    fns = _files(tmp_path, 4)
    dls = image_dls(fns, size=np.int64(8), bs=np.int32(2), n_in=np.int64(3), device='cpu')
    assert dls.one_batch()[0].shape==(2,3,8,8) and type(dls.bs) is int
    assert tensor_dls(torch.zeros(8,3,8,8), bs=np.int64(4), device='cpu').one_batch()[0].shape==(4,3,8,8)
    for bad in (np.int64(0), np.float64(2), '2'):
        with pytest.raises(ValueError, match='bs=.*whole number'): image_dls(fns, size=8, bs=bad)
    for bad in (np.inf, np.nan, np.float64(8.5), np.int64(-1), np.bool_(True)):
        with pytest.raises(ValueError, match='size=.*positive whole numbers'): image_dls(fns, size=bad, bs=2)

def test_sizes(tmp_path):
    "As they are in the file, of what `open_image` reads; an error as there"
    import tifffile
    Image.new('RGB', (9,5)).save(tmp_path/'a.png')
    Image.fromarray(np.zeros((5,9), np.uint16)).save(tmp_path/'b.png')
    tifffile.imwrite(tmp_path/'c.tif', np.zeros((5,9,7), np.uint16), photometric='minisblack', planarconfig='contig')
    assert [tuple(image_size(tmp_path/o, n)) for o,n in (('a.png',3),('b.png',1),('c.tif',7))]==[(5,9)]*3
    with pytest.raises(ImageFileError, match='gone.png .there is no such file'): image_size(tmp_path/'gone.png')
