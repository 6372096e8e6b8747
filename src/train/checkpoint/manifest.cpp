#include "train/checkpoint/manifest.hpp"

#define XXH_INLINE_ALL  // nothing to link
#include <fcntl.h>
#include <xxhash.h>

#include <cerrno>
#include <cstdio>
#include <fstream>
#include <set>
#include <system_error>
#include <utility>
#include <vector>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "planner/json.hpp"

namespace dualpipe::detail {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr const char* format_name = "dualpipe checkpoint";
constexpr const char* partial_suffix = ".partial";

std::string hexadecimal(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

/// The step of a name as `step-00000123`, -1 of any other.
std::int64_t step_of(const std::string& name) {
  const std::string prefix = "step-";
  const std::string digits = name.starts_with(prefix) ? name.substr(prefix.size()) : "";
  if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos) return -1;
  return std::stoll(digits);
}

/// @throws InvalidArgument  if there is an error.
void check_file(const std::error_code& error, const char* purpose, const fs::path& path) {
  DUALPIPE_CHECK(!error, "cannot ", purpose, " ", path.string(), ": ", error.message());
}

std::vector<fs::path> folders_in(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    std::error_code ignored;
    if (entry->is_directory(ignored)) found.push_back(entry->path());
  }
  check_file(error, "read", folder);
  return found;
}

/// A string, or one that no path can be.
std::string relative_file(const Json& value) {
  const std::string text = value.is_string() ? value.get<std::string>() : "";
  const fs::path path = text;
  bool within = !text.empty() && path.is_relative() && text.find('\0') == std::string::npos;
  for (const fs::path& part : path) within = within && part != "..";
  DUALPIPE_CHECK(within, "names the file ", brief(value), ", which is not in its folder");
  return text;
}

}  // namespace

struct Checksum::State {
  XXH64_state_t xxh;
};

Checksum::Checksum() : state_(std::make_unique<State>()) { XXH64_reset(&state_->xxh, 0); }
Checksum::~Checksum() = default;
void Checksum::add(std::string_view bytes) { XXH64_update(&state_->xxh, bytes.data(), bytes.size()); }
std::string Checksum::text() const { return hexadecimal(XXH64_digest(&state_->xxh)); }
std::string Checksum::of(std::string_view bytes) { return hexadecimal(XXH64(bytes.data(), bytes.size(), 0)); }

FileRecord write_recorded(const fs::path& path, const std::function<void(const Sink&)>& body) {
  AtomicFile file(path.string());
  Checksum checksum;
  FileRecord record;
  body([&](std::string_view bytes) {
    file.write(bytes);
    checksum.add(bytes);
    record.bytes += bytes.size();
  });
  file.commit();
  record.xxh64 = checksum.text();
  return record;
}

FileRecord record_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  DUALPIPE_CHECK(file.is_open(), "cannot read ", path.string(), ": ", std::generic_category().message(errno));
  std::vector<char> piece(std::size_t{1} << 20);
  Checksum checksum;
  FileRecord record;
  while (file.read(piece.data(), static_cast<std::streamsize>(piece.size())) || file.gcount() > 0) {
    checksum.add({piece.data(), static_cast<std::size_t>(file.gcount())});
    record.bytes += static_cast<std::uint64_t>(file.gcount());
  }
  DUALPIPE_CHECK(!file.bad(), "cannot read ", path.string());
  record.xxh64 = checksum.text();
  return record;
}

std::string Manifest::text() const {
  Json json{{"format", format_name},  {"version", checkpoint_version}, {"step", step}, {"token", token},
            {"num_ranks", num_ranks}, {"stage_prefix", stage_prefix},  {"run", run},   {"optimizer", optimizer},
            {"values", values},       {"files", Json::object()}};
  for (const auto& [path, record] : files) json["files"][path] = {{"bytes", record.bytes}, {"xxh64", record.xxh64}};
  json["xxh64"] = Checksum::of(json.dump());
  return json.dump(1) + "\n";
}

Manifest Manifest::parse(const std::string& text, const std::string& origin) {
  Json json;
  try {
    json = parse_json(text);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(origin + ": " + error.what());
  }
  DUALPIPE_CHECK(json.is_object() && json.contains("format") && json["format"] == format_name &&
                     json.contains("version") && json["version"].is_number_integer(),
                 origin, " is no manifest of a checkpoint");
  DUALPIPE_CHECK(json["version"] == checkpoint_version, origin, " has format version ", brief(json["version"]),
                 ", this program reads ", checkpoint_version, "; it needs the dualpipe that wrote it");
  const Json stated = json.contains("xxh64") ? json["xxh64"] : Json();
  json.erase("xxh64");
  DUALPIPE_CHECK(stated == Checksum::of(json.dump()), origin, " was altered after it was written");
  Manifest manifest;
  try {
    json.at("step").get_to(manifest.step);
    json.at("token").get_to(manifest.token);
    json.at("num_ranks").get_to(manifest.num_ranks);
    json.at("stage_prefix").get_to(manifest.stage_prefix);
    manifest.run = json.at("run");
    manifest.optimizer = json.at("optimizer");
    manifest.values = json.at("values");
    for (const auto& [path, record] : json.at("files").items())
      manifest.files[relative_file(path)] = {record.at("bytes").get<std::uint64_t>(),
                                             record.at("xxh64").get<std::string>()};
  } catch (const Json::exception& error) {
    throw InvalidArgument(str(origin, ": ", error.what()));
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(origin + " " + error.what());
  }
  return manifest;
}

std::string step_name(std::int64_t step) {
  char text[40];
  std::snprintf(text, sizeof text, "step-%08lld", static_cast<long long>(step));
  return text;
}

std::map<std::int64_t, fs::path> complete_checkpoints(const fs::path& folder) {
  std::map<std::int64_t, fs::path> found;
  for (const fs::path& path : folders_in(folder)) {
    std::error_code ignored;
    const std::int64_t step = step_of(path.filename().string());
    if (step >= 0 && fs::exists(path / manifest_name, ignored)) found[step] = path;
  }
  return found;
}

void remove_incomplete(const fs::path& folder) {
  for (const fs::path& path : folders_in(folder)) {
    const std::string name = path.filename().string();
    std::error_code ignored;
    const bool partial = name.ends_with(partial_suffix) && step_of(path.stem().string()) >= 0;
    if (partial || (step_of(name) >= 0 && !fs::exists(path / manifest_name, ignored))) remove_checkpoint(path);
  }
}

void remove_checkpoint(const fs::path& checkpoint) {
  std::error_code error;
  fs::remove(checkpoint / manifest_name, error);
  if (!error) fs::remove_all(checkpoint, error);
  check_file(error, "remove", checkpoint);
}

void rename_checkpoint(const fs::path& partial, const fs::path& complete) {
  std::error_code error;
  if (!fs::exists(complete, error)) {
    fs::rename(partial, complete, error);
    return check_file(error, "write", complete);
  }
  if (::renameat2(AT_FDCWD, partial.c_str(), AT_FDCWD, complete.c_str(), RENAME_EXCHANGE) != 0) {
    // Some file systems cannot exchange. Between the two lines there is none of this step, but those of others.
    remove_checkpoint(complete);
    fs::rename(partial, complete, error);
    return check_file(error, "write", complete);
  }
  remove_checkpoint(partial);
}

std::string index_text(std::uint64_t total_size, const std::map<std::string, std::string>& files) {
  return Json{{"metadata", {{"total_size", total_size}}}, {"weight_map", Json(files)}}.dump(1) + "\n";
}

std::map<std::string, std::string> read_index(const fs::path& path) {
  const std::string text = read_file(path.string());
  std::map<std::string, std::string> files;
  try {
    const Json json = parse_json(text);
    DUALPIPE_CHECK(json.is_object() && json.contains("weight_map") && json["weight_map"].is_object(),
                   "no index of safetensors files, which has a weight_map");
    for (const auto& [name, file] : json["weight_map"].items()) files[name] = relative_file(file);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(path.string() + ": " + error.what());
  }
  return files;
}

}  // namespace dualpipe::detail
