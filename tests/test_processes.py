"Processes that are forks are as fresh ones in all that a test may look at"
import os, random, signal, subprocess, sys, time

import numpy as np, pytest, torch

from processes import on_ranks, preload, run, start, wait_all

def lines(code, *args, **kwargs):
    "Output of `code`, which must end well"
    r = run('-c', code, *args, **kwargs)
    assert r.returncode==0 and r.stderr=='', r.stderr
    return r.stdout.splitlines()

def test_output_arguments_folder_environment(tmp_path):
    said = lines('import os, sys; print(sys.argv, sys.path[0]); print(os.getcwd()); print(sorted(os.environ), os.environ["X"]); print(sys.stdin.read()); print(__name__, dir())',
                 'a', 1, cwd=tmp_path, env=dict(X='ü', Y='2'), input='what is\nsaid')
    assert said[:5]==["['-c', 'a', '1'] ", str(tmp_path), "['X', 'Y'] ü", 'what is', 'said'] and said[5].startswith('__main__ ')
    assert lines('import os; print(os.environ["X"], os.getcwd(), os.environ["HOME"]==os.path.expanduser("~"))', env={**os.environ, 'X':'3'})==[f'3 {os.getcwd()} True']
    assert 'pytest' not in lines('import sys; print(*sys.modules)')[0].split()

def test_same_as_a_fresh_interpreter():
    "Filters of warnings, handlers of signals, threads, streams, open files and what else an import leaves behind"
    code = '''import self_supervised.all, os, re, signal, sys, tempfile, threading, torch, warnings, matplotlib
for o in (warnings.filters, [(o, signal.getsignal(o)) for o in signal.valid_signals()], threading.enumerate()==[threading.main_thread()], torch.get_num_threads(), torch.get_default_dtype(),
          torch.is_grad_enabled(), sys.path, sys.stdout.encoding, sys.stdout.line_buffering, tempfile.gettempdir(), matplotlib.get_backend(), __name__, os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd') else 0,
          os.getpid()==os.getsid(0)): print(re.sub('0x[0-9a-f]+', '', str(o)))'''
    env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    fresh,r = subprocess.run([sys.executable, '-c', f'{"import " + ", ".join(preload)}\n{code}'], capture_output=True, text=True, env=env, start_new_session=True),run('-c', code, env=env)
    assert fresh.returncode==r.returncode==0 and fresh.stdout.splitlines()==r.stdout.splitlines()

def test_random_numbers():
    "Two processes draw different ones where two interpreters would, and the tests keep theirs"
    before = random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()
    a,b = (lines('import random, numpy, torch; print(random.random()); print(numpy.random.rand()); print(torch.rand(1))') for _ in range(2))
    assert len({*a, *b})==6
    assert before==(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())

def test_exit_codes(tmp_path):
    code = lambda s: run('-c', s)
    assert [code(s).returncode for s in ('', 'raise SystemExit(7)', 'import sys; sys.exit(None)', 'import os; os._exit(9)', 'import os; os.abort()', '1/0')]==[0, 7, 0, 9, -signal.SIGABRT, 1]
    r = code('import sys; sys.exit("no")')
    assert (r.returncode, r.stderr)==(1, 'no\n')
    want = subprocess.run([sys.executable, '-c', '1/0'], capture_output=True, text=True).stderr
    assert code('1/0').stderr==want
    assert code('import atexit, threading, time; atexit.register(print, "end"); threading.Thread(target=lambda: (time.sleep(.1), print("thread"))).start()').stdout=='thread\nend\n'
    (tmp_path/'a.py').write_text('import sys, b\nfrom pathlib import Path\nprint(__file__, sys.argv, __name__)\nif __name__=="__main__": sys.exit(b.code)')
    (tmp_path/'b.py').write_text('code = 5')
    r = run(tmp_path/'a.py', 'x')
    assert (r.returncode, r.stdout)==(5, f"{tmp_path}/a.py ['{tmp_path}/a.py', 'x'] __main__\n")
    r = run('-m', 'a', 'x', cwd=tmp_path)
    assert (r.returncode, r.stdout)==(5, f"{tmp_path}/a.py ['{tmp_path}/a.py', 'x'] __main__\n")

def test_warnings():
    code = 'import warnings; warnings.warn("look")'
    assert run('-c', code).stderr=='<string>:1: UserWarning: look\n'
    for kw in (dict(args=('-W', 'ignore')), dict(env={**os.environ, 'PYTHONWARNINGS':'ignore'})): assert run(*kw.pop('args', ()), '-c', code, **kw).stderr==''
    assert run('-W', 'error', '-c', code).returncode==1

def test_console_scripts():
    r = run('ssl_knn', '--help')
    assert r.returncode==0 and 'usage: ssl_knn' in r.stdout
    assert run('ssl_knn').returncode==2
    assert 'no console script ssl_no' in run('ssl_no').stderr

@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_signals(sig):
    with start('-c', 'import time; print(1, flush=True); time.sleep(100)') as p:
        while not p.out(): time.sleep(.005)
        assert p.poll() is None and p.returncode is None
        with pytest.raises(subprocess.TimeoutExpired): p.wait(.05)
        p.send_signal(sig)
        assert p.wait(10)==p.returncode==p.poll()==-sig
        assert p.out()=='1\n' and ('KeyboardInterrupt' in p.err())==(sig==signal.SIGINT)
        p.kill() # of one that is dead: nothing

def test_handled_signal():
    with start('-c', 'import signal, time\ndef f(*_): print("bye"); raise SystemExit(4)\nsignal.signal(signal.SIGTERM, f); print(1, flush=True); time.sleep(100)') as p:
        while not p.out(): time.sleep(.005)
        p.terminate()
        assert p.communicate(10)==('1\nbye\n', '') and p.returncode==4

def test_nothing_is_left():
    "The end of `with` ends what the process has started too"
    with start('-c', 'import subprocess, sys; p = subprocess.Popen(["sleep", "100"]); print(p.pid, flush=True); p.wait()') as p:
        while not p.out().endswith('\n'): time.sleep(.005)
        child = int(p.out())
        os.kill(child, 0)
    assert p.returncode==-signal.SIGKILL
    end = time.monotonic()+10
    def alive():
        try: return open(f'/proc/{child}/stat').read().split()[2]!='Z'
        except OSError: return False
    while alive(): assert time.monotonic()<end

def test_streams(tmp_path):
    with (tmp_path/'out').open('w') as f: r = run('-c', 'import sys; print(1, flush=True); print(2, file=sys.stderr)', stdout=f, stderr=subprocess.STDOUT)
    assert (tmp_path/'out').read_text()=='1\n2\n' and r.stdout is None

def _write(path, text):
    path.write_text(text)
    raise SystemExit(3)

def test_functions(tmp_path):
    with start(_write, tmp_path/'x', 'here') as p: assert p.wait(60)==3
    assert (tmp_path/'x').read_text()=='here'

def _ranks(folder):
    t = torch.ones(2)*(torch.distributed.get_rank()+1)
    torch.distributed.all_reduce(t)
    return os.environ['RANK'],os.environ['WORLD_SIZE'],t,folder

def test_on_ranks(tmp_path):
    for n in (2, 3):
        for i,(r,w,t,folder) in enumerate(on_ranks(_ranks, tmp_path, n)): assert (r, w, folder)==(str(i), str(n), tmp_path) and t.tolist()==[n*(n+1)/2]*2

def _fails(folder):
    if torch.distributed.get_rank(): raise ValueError('not me')
    time.sleep(100)

def test_a_rank_fails(tmp_path):
    t = time.monotonic()
    with pytest.raises(RuntimeError, match='(?s)process 1: 1.*not me'): on_ranks(_fails, tmp_path, 2)
    assert time.monotonic()-t<60
    with pytest.raises(RuntimeError, match='not done in 0.1 seconds'): wait_all([start('-c', 'import time; time.sleep(50)')], .1)
