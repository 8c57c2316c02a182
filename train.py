"""Train GPT-2 in NumPy, from scratch or from a pretrained model: python train.py --help"""

if __name__ == "__main__":
    from cli.train import run

    raise SystemExit(run())
