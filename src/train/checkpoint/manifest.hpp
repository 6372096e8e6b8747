#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace dualpipe::detail {

/// xxhash64 of bytes that come piece by piece.
class Checksum {
 public:
  Checksum();
  ~Checksum();
  Checksum(const Checksum&) = delete;
  Checksum& operator=(const Checksum&) = delete;
  void add(std::string_view bytes);
  /// 16 hexadecimal digits.
  std::string text() const;
  static std::string of(std::string_view bytes);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct FileRecord {
  std::uint64_t bytes = 0;
  std::string xxh64;
  bool operator==(const FileRecord&) const = default;
};
using FileRecords = std::map<std::string, FileRecord>;  // by path within the checkpoint

using Sink = std::function<void(std::string_view)>;
/// An AtomicFile of what `body` gives to its sink.
FileRecord write_recorded(const std::filesystem::path& path, const std::function<void(const Sink&)>& body);
/// What is on the disk. @throws InvalidArgument  with the path.
FileRecord record_of(const std::filesystem::path& path);

inline constexpr const char* manifest_name = "manifest.json";
inline constexpr int checkpoint_version = 1;

/// manifest.json: what a checkpoint consists of. It is written last, so a folder that has one is complete.
struct Manifest {
  std::int64_t step = 0;
  std::string token;  ///< random, of this checkpoint
  int num_ranks = 1;
  bool stage_prefix = false;
  nlohmann::json run;        ///< schedule and sizes; for information only
  nlohmann::json optimizer;  ///< {"kind", "groups": [options of each], "group_of": {parameter: group}}
  nlohmann::json values;
  FileRecords files;

  std::string text() const;
  /// @param origin  names it in errors.
  /// @throws InvalidArgument  altered, no manifest, or one of a newer format.
  static Manifest parse(const std::string& text, const std::string& origin);
};

/// `step-00000123`
std::string step_name(std::int64_t step);
/// Folders in `folder` that hold a complete checkpoint, by step. @throws InvalidArgument  it cannot be read.
std::map<std::int64_t, std::filesystem::path> complete_checkpoints(const std::filesystem::path& folder);
/// Removes what killed runs have left in `folder`.
void remove_incomplete(const std::filesystem::path& folder);
/// A checkpoint whose removal is interrupted is no longer complete. @throws InvalidArgument  with the path.
void remove_checkpoint(const std::filesystem::path& checkpoint);
/// `partial` becomes `complete`, which may exist and is removed then. @throws InvalidArgument  with the path.
void rename_checkpoint(const std::filesystem::path& partial, const std::filesystem::path& complete);

/// {"metadata": {"total_size"}, "weight_map": {name: file}}, as Hugging Face has it.
std::string index_text(std::uint64_t total_size, const std::map<std::string, std::string>& files);
/// From name to file. @throws InvalidArgument  no such index, or a file outside of its folder.
std::map<std::string, std::string> read_index(const std::filesystem::path& path);

}  // namespace dualpipe::detail
