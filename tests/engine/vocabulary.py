from types import SimpleNamespace
STOP = frozenset({1, 107})
PIECES = ["<pad>","<eos>","<bos>","<unk>"] + [chr(0x4e00+i) for i in range(4, 44)] + [f"<0x{b:02X}>" for b in range(256)]
for i, c in enumerate("abcdefghxyz"): PIECES[10+i] = c
PIECES += ["q"]*(300-len(PIECES))
def tokenizer():
    return SimpleNamespace(vocab_size=300, stop_ids={1,107}, piece=lambda i: "" if i in (1,107) or i<4 else PIECES[i], piece_to_id=PIECES.index)
