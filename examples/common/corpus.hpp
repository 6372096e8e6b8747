#pragma once

#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace example {

/// Files read as if they were one, one after the other. Only an index: bytes are read when they are asked for, so that
/// eight processes need no eight copies, and a text may be larger than memory.
class Text {
 public:
  /// @param offset, length  the part of the file that is meant.
  void append(const std::filesystem::path& path, std::int64_t offset, std::int64_t length);
  /// In bytes.
  std::int64_t size() const noexcept { return size_; }
  /// uint8 [length]. @throws dualpipe::InvalidArgument  a file that cannot be read, or became shorter.
  torch::Tensor read(std::int64_t offset, std::int64_t length) const;

 private:
  struct Piece {
    std::filesystem::path path;
    std::int64_t file_offset;
    std::int64_t begin;  // in the whole text
    std::int64_t length;
  };
  std::vector<Piece> pieces_;
  std::int64_t size_ = 0;
};

/// What the model learns from, and what it is judged by.
struct Corpus {
  Text training;
  Text held_out;  ///< every twentieth file; of fewer than twenty files the last twentieth of the text
  int num_files = 0;
  int num_skipped = 0;  ///< files that hold no text
};

/// Where LibTorch's headers lie: C++ on every machine that can build this.
std::filesystem::path default_text();

/// Looks through files and folders, these with all that is below them, in an order that depends on names alone. Files
/// that are empty or hold a zero byte in their first 4 KiB are skipped; links to folders are not followed.
///
/// @throws dualpipe::InvalidArgument  a path that does not exist or cannot be read, a path of a single file that is no
/// text, or fewer
///                                    than `shortest` bytes to train on or to hold out; the text names the path.
Corpus open_corpus(const std::vector<std::filesystem::path>& paths, std::int64_t shortest);

/// Windows `first` to `first + count - 1` of an endless series that follows from `seed`, int64 [count, length]. Ranks
/// that take different parts of it learn from different text.
torch::Tensor random_windows(const Text& text, std::int64_t first, std::int64_t count, std::int64_t length,
                             std::uint64_t seed);
/// The same of `total` windows at equal distances, from the first byte to the last.
torch::Tensor spread_windows(const Text& text, std::int64_t first, std::int64_t count, std::int64_t total,
                             std::int64_t length);

}  // namespace example
