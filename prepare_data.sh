#!/usr/bin/env bash
# Fetch a data set, check it, unpack it and cut it into tiles (data.py prepare).
#
#   ./prepare_data.sh monuseg                 44 images of nuclei, CC BY-NC-SA 4.0
#   ./prepare_data.sh bcss                    breast cancer tissue in 224 x 224 tiles, CC0, 8 GB
#   ./prepare_data.sh bcss512                 its 512 x 512 tiles, from the same archive
#   ./prepare_data.sh weights                 Microsoft's Swin-T, pretrained on ImageNet
#   ./prepare_data.sh monuseg --from DIR...   no download: DIR holds the archives (*.zip) or
#                                             their unpacked folders, or is an archive itself
#   ./prepare_data.sh bcss --data-root DIR    where everything goes (default: data)
#
# monuseg also takes --raster and --later-images, which python data.py prepare --help explains. Run
# it again after an interruption: it goes on where it stopped. Once unpacked, the archives in
# data/raw may be deleted. Environment: MONUSEG_TRAIN_URL, MONUSEG_TEST_URL, BCSS_URL, SWIN_URL, the
# same names with SHA256 for URL, and PYTHON.

set -euo pipefail

die() { echo "prepare_data.sh: $*" >&2; exit 2; }
absolute() { case $1 in /* | [A-Za-z]:*) echo "$1" ;; *) echo "$caller/$1" ;; esac; }
size() { wc -c <"$1" | tr -d ' '; }
sha256() { { sha256sum 2>/dev/null || shasum -a 256; } <"$1" | cut -c 1-64; }

lock() {  # FOLDER: create it, and lock it until this script ends, where flock is installed
  mkdir -p "$1" && exec 9<"$1" || exit 2
  if command -v flock >/dev/null && ! flock -n 9; then
    die "another prepare_data.sh is at work in $1: wait until it has unpacked its archives"
  fi
}

# Without a known checksum, a ZIP archive is whole when it can be listed: its index comes last.
whole() {  # FILE SHA256
  if [ -n "$2" ]; then [ "$(sha256 "$1")" = "$2" ]; else "$python" -m zipfile -l "$1"; fi
} &>/dev/null

# Nothing to fetch if it is unpacked already, if --from replaces it, or if it is here and whole.
fetch() {  # ADDRESS SHA256 FILE
  local part=$3.part folder before came by_hand="./prepare_data.sh $name"
  for folder in "${3%.zip}"-[0-9]*; do [ ! -d "$folder" ] || return 0; done
  if [ -n "$from" ] || whole "$3" "$2"; then return; fi
  if [ "$name" != weights ]; then by_hand="$by_hand --from '${3%/*}'"; fi
  by_hand="open that address in a browser, save the file in '${3%/*}' and run $by_hand"
  lock "${3%/*}" && touch "$part" || exit 2
  echo "fetching $3"
  # Where a connection broke or fell silent, another one goes on; curl's --retry would start anew.
  until before=$(size "$part"); whole "$part" "$2" || curl --fail --location --show-error \
    "$meter" --connect-timeout 60 --speed-limit 1000 --speed-time 60 --continue-at - \
    --output "$part" "$1"; do
    [ "$(size "$part")" -gt "$before" ] || die "could not download $1:" \
      "run this again to resume; if that never helps, delete $part or $by_hand"
  done
  if whole "$part" "$2"; then mv "$part" "$3"; return; fi
  came="a file of sha256 $(sha256 "$part")"
  if head -c 1024 "$part" | LC_ALL=C grep -qiE '<html|<!doctype'; then came='a web page'; fi
  rm "$part"  # or the next try would resume into it
  die "$1 sent $came instead of ${3##*/} (expected sha256: ${2:-of a ZIP archive}): $by_hand"
}

# Stem and size name the folder: a browser's copy of a known archive is not unpacked twice, and
# another archive of the same name is not taken for it.
unpack() {  # ARCHIVE FOLDER-THAT-MAY-HOLD-IT-UNPACKED
  local folder said top
  folder=$raw/$(basename "${1%.*}")-$(size "$1")
  if [ ! -d "$folder" ]; then
    said=$("$python" -m zipfile -l "$1" 2>&1) || die "$1 is cut short or no ZIP: fetch it anew"
    # shellcheck disable=SC2053
    [[ $said == $images* ]] || { echo "left alone, no $images in it: $1"; return; }
    top=$(sed -n '2s,^\([^/.][^/]*\)/.*,\1,p' <<<"$said")
    if [ -n "$top" ] && [ -d "$2/$top" ]; then echo "unpacked already: $1"; return; fi
    echo "unpacking $1"
    lock "$raw" && rm -rf "$raw.part" || exit 2
    if ! said=$("$python" -m zipfile -e "$1" "$raw.part" 2>&1); then
      rm -rf "$raw.part"
      die "could not unpack $1 (${said##*[[:cntrl:]]}): if damaged, delete it and fetch it anew"
    fi
    mv "$raw.part" "$folder"
  fi
  unpacked=$raw
}

# The command line. Relative paths are meant from the folder in which it was typed.
caller=$PWD name=${1:---help} root=data from='' flag='' unpacked='' sources=() folders=() options=()
cd "$(dirname "$0")"
[ $# -eq 0 ] || shift
for word; do
  case $word:$flag in
    -h:* | --help:*) name=--help ;;
    --from:*) flag=--from from=yes ;;
    --from=* | --data-root=*) die "write ${word%%=*} PATH, without the =" ;;
    --data-root:* | --raster:* | --later-images:*)
      [ "$word" = --data-root ] || [ "$name" = monuseg ] || die "$word is for monuseg"
      flag=$word; options+=("$word") ;;
    -*) die "no flag is called $word: see --help" ;;
    *:--from) sources+=("$(absolute "$word")") ;;
    *:--raster) options+=("$word")
      [ "$word" = paper ] || [ "$word" = exact ] || die "--raster is paper or exact, not $word" ;;
    *:--data-root) root=$(absolute "$word"); options+=("$root") ;;
    *) options+=("$word") ;;
  esac
done
case ${word-} in --raster | --data-root) die "$word needs a value" ;; esac
[ ${#sources[@]} -gt 0 ] || [ -z "$from" ] || die "--from needs a folder or an archive"
python=${PYTHON:-$(command -v python || command -v python3 || echo python)}
command -v "$python" >/dev/null || [ "$name" = weights ] || die "no $python here: set PYTHON"
if [ -t 2 ]; then meter=--progress-bar; else meter=--silent; fi

drive='https://drive.usercontent.google.com/download?export=download&confirm=t&id='
kaggle=https://www.kaggle.com/api/v1/datasets/download/whats2000
swin=https://github.com/SwinTransformer/storage/releases/download/v1.0.0
case $name in
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${0##*/}"; exit ;;
  monuseg)
    raw=$root/raw/monuseg images='*.tif'
    fetch "${MONUSEG_TRAIN_URL:-${drive}1ZgqFJomqQGNnsx7w7QBzQQMVA16lbVCA}" \
      "${MONUSEG_TRAIN_SHA256:-25d3d3185bb2970b397cafa72eb664c9b4d24294aee382e7e3df9885affce742}" \
      "$raw/MoNuSeg 2018 Training Data.zip"
    fetch "${MONUSEG_TEST_URL:-${drive}1NKkSQ5T0ZNQ8aUhh0a8Dt2YKYCQXIViw}" \
      "${MONUSEG_TEST_SHA256:-13e522387ae8b1bcc0530e13ff9c7b4d91ec74959ef6f6e57747368d7ee6f88a}" \
      "$raw/MoNuSegTestData.zip" ;;
  bcss | bcss512)
    raw=$root/raw/bcss images='*_mask*.png'
    fetch "${BCSS_URL:-$kaggle/breast-cancer-semantic-segmentation-bcss}" "${BCSS_SHA256:-}" \
      "$raw/archive.zip" ;;
  weights)
    [ -z "$from" ] || die "weights takes no --from"
    fetch "${SWIN_URL:-$swin/swin_tiny_patch4_window7_224.pth}" \
      "${SWIN_SHA256:-9f71c168d837d1b99dd1dc29e14990a7a9e8bdc5f673d46b04fe36fe15590ad3}" \
      "$root/weights/swin_tiny_patch4_window7_224.pth"
    exit ;;
  monuseg-exact) die "monuseg-exact is prepared by ./prepare_data.sh monuseg --raster exact" ;;
  *) die "no data set is called '$name': give monuseg, bcss, bcss512 or weights; for images of" \
       "your own run python data.py prepare $name --from DIR" ;;
esac

# Archives are unpacked into $raw, folders are used where they are.
[ -n "$from" ] || sources=("$raw")
for source in "${sources[@]}"; do
  [ -e "$source" ] || die "there is no file or folder $source"
  for zip in "$source" "$source"/*.[zZ][iI][pP]; do
    if [ -f "$zip" ]; then unpack "$zip" "$source"; fi
  done
  if [ "$source" -ef "$raw" ]; then unpacked=$raw
  elif [ -n "$(find -L "$source" -ipath "$images" -print -quit)" ]; then folders+=("$source"); fi
done
folders+=(${unpacked:+"$unpacked"})
[ ${#folders[@]} -gt 0 ] || die "no $images, nor an archive with one, in ${sources[*]}"
# 9>&-: the lock is this script's, and ends here; data.py has its own.
exec "$python" data.py prepare "$name" --from "${folders[@]}" ${options[@]+"${options[@]}"} 9>&-
