#include "corpus.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <set>

#include "dualpipe/error.hpp"

namespace example {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kHeldOutShare = 20;

std::ifstream open(const fs::path& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  DUALPIPE_CHECK(file, "cannot read ", path, ": ", errno != 0 ? std::strerror(errno) : "unknown reason");
  return file;
}

bool is_text(const fs::path& path) {
  std::ifstream file = open(path);
  char head[4096];
  file.read(head, sizeof head);
  DUALPIPE_CHECK(!file.bad(), "cannot read ", path);
  return file.gcount() > 0 && std::memchr(head, '\0', static_cast<std::size_t>(file.gcount())) == nullptr;
}

/// Regular files at or below `root`. A set: its order is that of the names.
void collect(const fs::path& root, std::set<fs::path>& files) {
  const fs::path start = fs::canonical(root);
  if (!fs::is_directory(start)) {
    DUALPIPE_CHECK(fs::is_regular_file(start), "cannot train on ", root, ": it is neither a file nor a folder");
    DUALPIPE_CHECK(is_text(start), "cannot train on ", root, ": it is empty or no text (there is a zero byte in it)");
    files.insert(start);
    return;
  }
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(start))
    if (entry.is_regular_file()) files.insert(entry.path());
}

}  // namespace

void Text::append(const fs::path& path, std::int64_t offset, std::int64_t length) {
  if (length <= 0) return;
  pieces_.push_back({path, offset, size_, length});
  size_ += length;
}

torch::Tensor Text::read(std::int64_t offset, std::int64_t length) const {
  DUALPIPE_CHECK(offset >= 0 && length >= 0 && length <= size_ - offset, "bytes ", offset, " to ", offset + length,
                 " of a text of ", size_);
  torch::Tensor bytes = torch::empty({length}, torch::kUInt8);
  if (length == 0) return bytes;
  auto* to = bytes.mutable_data_ptr<std::uint8_t>();
  auto piece = std::prev(std::upper_bound(pieces_.begin(), pieces_.end(), offset,
                                          [](std::int64_t at, const Piece& next) { return at < next.begin; }));
  for (std::int64_t done = 0; done < length; ++piece) {
    const std::int64_t skip = offset + done - piece->begin;
    const std::int64_t count = std::min(length - done, piece->length - skip);
    std::ifstream file = open(piece->path);
    file.seekg(piece->file_offset + skip);
    file.read(reinterpret_cast<char*>(to + done), count);
    DUALPIPE_CHECK(file.gcount() == count, "cannot read ", count, " bytes at ", piece->file_offset + skip, " of ",
                   piece->path, ": did it change?");
    done += count;
  }
  return bytes;
}

fs::path default_text() { return EXAMPLE_DEFAULT_TEXT; }

Corpus open_corpus(const std::vector<fs::path>& paths, std::int64_t shortest) {
  Corpus corpus;
  std::vector<std::pair<fs::path, std::int64_t>> files;
  std::int64_t total = 0;
  try {
    std::set<fs::path> found;
    for (const fs::path& path : paths) collect(path, found);
    for (const fs::path& path : found) {
      if (!is_text(path)) {
        ++corpus.num_skipped;
        continue;
      }
      files.emplace_back(path, static_cast<std::int64_t>(fs::file_size(path)));
      total += files.back().second;
    }
  } catch (const fs::filesystem_error& error) {
    throw dualpipe::InvalidArgument(dualpipe::detail::str("cannot read ", error.path1(), ": ", error.code().message()));
  }

  corpus.num_files = static_cast<int>(files.size());
  const bool by_file = corpus.num_files >= kHeldOutShare;
  std::int64_t before = 0;
  for (std::size_t i = 0; i < files.size(); ++i) {
    const auto& [path, size] = files[i];
    std::int64_t learned = i % kHeldOutShare == kHeldOutShare - 1 ? 0 : size;
    if (!by_file) learned = std::clamp<std::int64_t>(total - total / kHeldOutShare - before, 0, size);
    corpus.training.append(path, 0, learned);
    corpus.held_out.append(path, learned, size - learned);
    before += size;
  }
  DUALPIPE_CHECK(corpus.held_out.size() >= shortest && corpus.training.size() >= shortest, "too little text in ",
                 paths.empty() ? fs::path() : paths.front(), paths.size() > 1 ? " and the other paths" : "", ": ",
                 corpus.num_files, " files, ", corpus.training.size(), " bytes to train on and ",
                 corpus.held_out.size(), " held out, of each at least ", shortest,
                 " are needed; give more text, or a smaller --context");
  return corpus;
}

torch::Tensor random_windows(const Text& text, std::int64_t first, std::int64_t count, std::int64_t length,
                             std::uint64_t seed) {
  std::mt19937_64 random(seed);
  random.discard(static_cast<unsigned long long>(first));
  std::vector<torch::Tensor> windows;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto places = static_cast<std::uint64_t>(text.size() - length + 1);
    windows.push_back(text.read(static_cast<std::int64_t>(random() % places), length));
  }
  return torch::stack(windows).to(torch::kInt64);
}

torch::Tensor spread_windows(const Text& text, std::int64_t first, std::int64_t count, std::int64_t total,
                             std::int64_t length) {
  std::vector<torch::Tensor> windows;
  for (std::int64_t i = first; i < first + count; ++i)
    windows.push_back(text.read((text.size() - length) * i / std::max<std::int64_t>(total - 1, 1), length));
  return torch::stack(windows).to(torch::kInt64);
}

}  // namespace example
