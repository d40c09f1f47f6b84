#!/bin/sh
# Fetches tiny Shakespeare: 1.1 MB of plays in one text file, enough to see a small model learn in minutes.
#
#     sh data/tinyshakespeare.sh            # writes data/tinyshakespeare.txt
#     sh data/tinyshakespeare.sh /tmp       # writes /tmp/tinyshakespeare.txt
#
# Then: python data/tokenize.py data/tinyshakespeare.txt --out data/tinyshakespeare
# Needs curl or wget, and sha256sum or shasum. A copy that is already there and correct is left as it is.

url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed

die() {
    echo "tinyshakespeare.sh: $*" >&2
    exit 1
}

digest() {
    if command -v sha256sum >/dev/null; then
        sha256sum <"$1" | cut -d ' ' -f 1
    elif command -v shasum >/dev/null; then
        shasum -a 256 <"$1" | cut -d ' ' -f 1
    else
        die "needs sha256sum or shasum to check the file; install one of them"
    fi
}

[ $# -le 1 ] || die "takes one folder at most, got $# arguments"
dir=${1:-$(dirname "$0")}
[ -d "$dir" ] || die "there is no folder $dir; make it first"
file=$dir/tinyshakespeare.txt

if [ -e "$file" ]; then
    if [ ! -f "$file" ] || [ ! -r "$file" ]; then
        die "$file is there, and is not a file that can be read; move it away"
    fi
    found=$(digest "$file") || exit 1
    [ "$found" = $sha256 ] || die "$file is there, but is not tiny Shakespeare (wrong sha256); move it away"
    echo "$file is already there and correct"
    exit 0
fi

# In the same folder, so that the last step is a rename and the file is never there in part.
part=$file.tmp.$$
trap 'rm -f "$part"' EXIT
trap 'exit 1' HUP INT TERM
(: >"$part") 2>/dev/null || die "cannot write to the folder $dir"
if command -v curl >/dev/null; then
    curl --fail --silent --location --output "$part" "$url"
elif command -v wget >/dev/null; then
    wget --quiet --output-document "$part" "$url"
else
    die "needs curl or wget; or download $url by other means and put it at $file"
fi || die "could not download $url; is there a network? Or get it by other means and put it at $file"

found=$(digest "$part") || exit 1
[ "$found" = $sha256 ] || die "what came from $url is not the expected file (wrong sha256); try again later"
mv "$part" "$file" || die "could not write $file"
echo "wrote $file ($(wc -c <"$file" | tr -d ' ') bytes)"
