"""Python processes for the tests, each in a moment: a parent, started once, has imported the package, and every process is a fork of it

    from processes import on_ranks, run, start

    r = run('-c', 'print(1)', 'a', cwd=tmp_path, env={**os.environ, 'X':'1'}) # as subprocess.run([sys.executable, …], capture_output=True, text=True)
    r = run('-W', 'ignore', path/'script.py', 'a', input='yes', timeout=60)   # also: '-m', 'module'
    r = run('ssl_knn', 'run', 'photos')                                       # a console script
    assert r.returncode==0 and r.stdout=='1\\n', r.stderr
    with start('ssl_pretrain', 'photos') as p:                                # as Popen: pid, poll, wait, send_signal, terminate, kill, communicate, returncode
        while 'epoch' not in p.out(): time.sleep(.01)                         # its output so far, and p.err()
        p.send_signal(signal.SIGINT)
        assert p.wait(60)==130
                                                                              # here: it and what it started are dead
    with start(function, 1, 'b') as p: …                                      # function(1, 'b') of a test file or any module: its own exit code, its result is lost
    a,b = on_ranks(function, tmp_path, 2)                                     # results of function(tmp_path) on 2 processes joined by gloo

A process is as a fresh interpreter with the package imported: its own environment, folder, standard streams (files, or what `stdout`, `stderr`, `stdin` say),
session, `__main__`, signals, random numbers, warnings; its exit code is a real one. What differs: torch has OMP_NUM_THREADS threads or one; what libraries read from the
environment while they are imported (HF_HOME, MPLBACKEND, fastai's folders under HOME) is that of the tests, and so is the seed of `hash`; /proc/PID/environ and
`ps` show the parent's; the end runs the exit handlers, and leaves modules and what they hold alone. A test of what happens before or while the package is imported needs `subprocess`."""
import atexit, fcntl, gc, os, pickle, runpy, selectors, shutil, signal, socket, struct, subprocess, sys, tempfile, threading, time, types, warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

preload = 'self_supervised.all', 'self_supervised.cli'
no_card = dict(CUDA_VISIBLE_DEVICES='', PYTORCH_NVML_BASED_CUDA_CHECK='1') # for the parent: no fork can use a card that it has only looked for

if __name__!='__main__': os.environ.setdefault('SSL_TESTS_PARENT', f'{tempfile.gettempdir()}/ssl_tests_{os.getpid()}') # the folder of the parent; workers of pytest-xdist share it

# ---- the side of the tests

_user = None # the connection that keeps the parent alive

def _folder(): return Path(os.environ['SSL_TESTS_PARENT'])

def _connect():
    s = socket.socket(socket.AF_UNIX)
    s.connect(str(_folder()/'socket'))
    return s

def _parent():
    "Start the parent, if nobody has"
    global _user
    if _user: return
    folder = _folder()
    folder.mkdir(exist_ok=True)
    with (folder/'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try: _user = _connect()
        except OSError:
            (folder/'socket').unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as s, (folder/'log').open('w') as log:
                s.bind(str(folder/'socket'))
                s.listen(100)
                subprocess.Popen([sys.executable, __file__, str(s.fileno())], pass_fds=[s.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                 cwd=Path(__file__).parent, env={**os.environ, 'OMP_NUM_THREADS':'1', 'MPLBACKEND':'Agg', **no_card}, start_new_session=True)
                _user = _connect()
        _send(_user, None)
    atexit.register(_user.close)

def _send(s, msg, fds=()):
    b = pickle.dumps(msg)
    socket.send_fds(s, [struct.pack('!Q', len(b))], fds)
    s.sendall(b)

class Process:
    "A started process; at the end of its `with` it is killed, with all that it has started"
    def __init__(self, args, s, out, err):
        self.args,self._s,self._out,self._err,self.returncode = args,s,out,err,None
        self.pid = self._recv(None)

    def _recv(self, timeout):
        self._s.settimeout(timeout)
        try: b = self._s.recv(4, socket.MSG_WAITALL)
        except ConnectionError: b = b''
        if len(b)<4: raise RuntimeError(f'the parent of all processes has ended: {(_folder()/"log").read_text() if _folder().exists() else ""}')
        return struct.unpack('!i', b)[0]

    def poll(self):
        "The exit code, or None"
        if self.returncode is None:
            with suppress(BlockingIOError, TimeoutError): self.returncode = self._recv(0)
        return self.returncode

    def wait(self, timeout=None):
        "Wait for its end: the exit code"
        if self.returncode is None:
            try: self.returncode = self._recv(timeout)
            except TimeoutError: raise subprocess.TimeoutExpired(self.args, timeout, self.out(), self.err()) from None
        return self.returncode

    def communicate(self, timeout=None):
        "Wait for its end: all output"
        self.wait(timeout)
        return self.out(),self.err()

    def out(self): return self._out.read_text() if self._out else None
    def err(self): return self._err.read_text() if self._err else None
    def send_signal(self, sig):
        if self.poll() is None: os.kill(self.pid, sig)
    def terminate(self): self.send_signal(signal.SIGTERM)
    def kill(self): self.send_signal(signal.SIGKILL)
    def end(self):
        "Kill it and what it has started"
        with suppress(ProcessLookupError): os.killpg(self.pid, signal.SIGKILL)
        self.wait(60)

    def __enter__(self): return self
    def __exit__(self, *_): self.end()

def start(what, *args, env=None, cwd=None, input=None, stdin=None, stdout=None, stderr=None):
    "Start `python what args`, a console script or a function, in a session of its own; without `stdout` and `stderr` the output is in files, see `Process`"
    _parent()
    opened = []
    def file(std, mode='ab'):
        if std is not None: return std if isinstance(std, int) else std.fileno(),None
        fd,nm = tempfile.mkstemp(dir=_folder())
        opened.append(fd)
        return fd,Path(nm)
    if stdin is None: opened.append(i := os.open(os.devnull, os.O_RDONLY))
    else: i = file(stdin)[0]
    if input is not None:
        i = file(None)[0]
        os.write(i, input.encode()); os.lseek(i, 0, os.SEEK_SET)
    o,out = file(stdout)
    e,err = (o,None) if stderr==subprocess.STDOUT else file(stderr)
    call = pickle.dumps((what, args)) if callable(what) else None
    argv = [what.__qualname__ if hasattr(what, '__qualname__') else repr(what)] if call else [str(a) for a in (what, *args)]
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect(str(_folder()/'socket'))
        _send(s, dict(argv=argv, call=call, path=sys.path, env=dict(os.environ if env is None else env), cwd=str(cwd or Path.cwd())), [i,o,e])
    finally:
        for fd in opened: os.close(fd)
    return Process(argv, s, out, err)

def run(what, *args, timeout=None, **kwargs):
    "`start` and wait: a `CompletedProcess` with the output as text"
    with start(what, *args, **kwargs) as p:
        p.wait(timeout)
        return subprocess.CompletedProcess(p.args, p.returncode, p.out(), p.err())

def _rank(r, n, job, folder, backend):
    import torch
    import torch.distributed as tdist
    cards = torch.cuda.device_count() # which the processes share
    os.environ.update(RANK=str(r), LOCAL_RANK=str(r%cards if cards else r), WORLD_SIZE=str(n), MASTER_ADDR='localhost', MASTER_PORT='0') # as a launcher does
    tdist.init_process_group(backend, init_method=f'file://{folder}/meet', rank=r, world_size=n)
    try: torch.save(job(folder), f'{folder}/{r}.pt')
    finally: tdist.destroy_process_group()

def wait_all(ps, timeout=300):
    "Wait for all of `ps`; when one fails, kill the others"
    end = time.monotonic()+timeout
    while None in (codes := [p.poll() for p in ps]) and not any(codes) and time.monotonic()<end: time.sleep(.005)
    bad = [f'process {i}: {p.returncode}\n{p.err()}' for i,p in enumerate(ps) if p.poll()]
    late = any(p.returncode is None for p in ps) and not bad
    for p in ps: p.end()
    if bad or late: raise RuntimeError('\n'.join(bad) or f'not done in {timeout} seconds')

def on_ranks(job, folder, n, timeout=300, backend='gloo'):
    "Results of `job(folder)` on each of `n` processes that are joined by `backend`"
    import torch
    for o in ('meet', *(f'{r}.pt' for r in range(n))): (folder/o).unlink(missing_ok=True)
    wait_all([start(_rank, r, n, job, folder, backend) for r in range(n)], timeout)
    return [torch.load(folder/f'{r}.pt', weights_only=False) for r in range(n)]

# ---- the parent

def _request(s):
    b,fds,*_ = socket.recv_fds(s, 8, 3)
    n,b = struct.unpack('!Q', b)[0],b''
    while len(b)<n: b += s.recv(n-len(b))
    return pickle.loads(b),fds

def _serve(fd):
    "Fork for every request, and tell its connection the pid and the exit code; end with the last user. Returns in the forks: the request"
    listener,(awake,wake) = socket.socket(fileno=fd),socket.socketpair()
    for o in (awake, wake): o.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    users,children,sel = set(),{},selectors.DefaultSelector()
    for o in (listener, awake): sel.register(o, selectors.EVENT_READ)
    while True:
        for k,_ in sel.select():
            if k.fileobj is awake:
                with suppress(BlockingIOError): awake.recv(1000)
                while children:
                    pid,status = os.waitpid(-1, os.WNOHANG)
                    if not pid: break
                    with suppress(OSError), children.pop(pid) as s: s.sendall(struct.pack('!i', os.waitstatus_to_exitcode(status)))
            elif k.fileobj is listener:
                s,_ = listener.accept()
                req,fds = _request(s)
                if req is None:
                    users.add(s)
                    sel.register(s, selectors.EVENT_READ)
                    continue
                if pid := os.fork():
                    children[pid] = s
                    for o in fds: os.close(o)
                    with suppress(OSError): s.sendall(struct.pack('!i', pid))
                else:
                    for o in (s, listener, awake, wake, *users, *children.values(), sel): o.close()
                    return req,fds
            else: # a user says nothing: it has ended
                users.remove(k.fileobj)
                sel.unregister(k.fileobj)
                if users: continue
                for pid in children:
                    with suppress(OSError): os.killpg(pid, signal.SIGKILL)
                shutil.rmtree(_folder(), ignore_errors=True)
                os._exit(0)

def _be_fresh(req, fds):
    "What an interpreter that has just been started, and has imported the package, would be"
    import numpy as np, torch
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    for i,fd in enumerate(fds): os.dup2(fd, i)
    for fd in fds: os.close(fd)
    os.environ.clear(); os.environ.update(req['env'])
    os.chdir(req['cwd'])
    tempfile.tempdir = None
    np.random.seed(); torch.default_generator.seed() # `random` sees to this itself
    torch.set_num_threads(int(req['env'].get('OMP_NUM_THREADS', 1)))

def _execute(req):
    "`python argv`, or the function"
    argv,said,main = list(req['argv']),[o for o in req['env'].get('PYTHONWARNINGS', '').split(',') if o],types.ModuleType('__main__')
    main.__builtins__,main.__spec__ = __builtins__,None
    path = [o for o in req['env'].get('PYTHONPATH', '').split(os.pathsep) if o and o not in sys.path]+sys.path[1:]
    if req['call']:
        sys.argv,sys.path[:],sys.modules['__main__'] = argv,req['path'],main
        f,args = pickle.loads(req['call'])
        f(*args)
        return
    while argv[0] in ('-W','-u'):
        if argv.pop(0)=='-W': said.append(argv.pop(0))
        else: sys.stdout.reconfigure(write_through=True)
    if said: warnings._processoptions(said)
    first,sys.argv = argv[0],argv
    def become(first_path, **kwargs):
        sys.path[:] = [first_path, *path]
        vars(main).update(kwargs)
        sys.modules['__main__'] = main
        return vars(main)
    if first=='-c':
        code,sys.argv = argv[1],['-c', *argv[2:]]
        exec(compile(code, '<string>', 'exec'), become(''))
    elif first=='-m':
        sys.argv = argv[1:]
        become(os.getcwd())
        runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
    elif first.endswith('.py'):
        exec(compile(Path(first).read_bytes(), first, 'exec'), become(str(Path(first).resolve().parent), __file__=first))
    else:
        from importlib.metadata import entry_points
        bin = Path(sys.executable).parent
        sys.argv[0] = str(bin/first)
        become(str(bin), __file__=sys.argv[0])
        found = entry_points(group='console_scripts', name=first)
        if not found: sys.exit(f'there is no console script {first}')
        sys.exit(next(iter(found)).load()())

def _end(f, *args):
    "End as an interpreter does after `f`, but for taking its modules to pieces, for which all memory would have to be copied: three seconds"
    code = 0
    def attempt(f, *args):
        nonlocal code
        try: f(*args)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
            if not isinstance(e.code, int|None): print(e.code, file=sys.stderr)
        except BaseException as e:
            code = -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
            tb = e.__traceback__
            while tb.tb_next and tb.tb_frame.f_code.co_filename==__file__: tb = tb.tb_next
            sys.excepthook(type(e), e.with_traceback(tb), tb)
    for o in (partial(f, *args), threading._shutdown, atexit._run_exitfuncs): attempt(o)
    for o in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError): o.flush()
    if code==-signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 255)

if __name__=='__main__':
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[0] = str(Path(__file__).resolve().parent.parent) # the package is that of this tree
    for nm in preload: __import__(nm)
    gc.collect(); gc.freeze() # a collection in a fork would copy all that it looks at
    _req,_fds = _serve(int(sys.argv[1]))
    _be_fresh(_req, _fds)
    _end(_execute, _req)
