def test_x(truth, inside, tiny_flags):
    for p in ("Ondřej 你好","Ondřej 你好 🤗", "Hello", "bye", "你好"):
        print(repr(p), repr(truth(p)))
    for d in ("/proc", "/proc/self"):
        print(inside("x", "--models_dir", d))
