#include "train/safetensors/header.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "dualpipe/error.hpp"
#include "planner/json.hpp"

namespace dualpipe::detail {
namespace {

using Json = nlohmann::json;

constexpr std::array<std::pair<std::string_view, int>, 10> kItemBytes{{{"F64", 8},
                                                                       {"F32", 4},
                                                                       {"F16", 2},
                                                                       {"BF16", 2},
                                                                       {"I64", 8},
                                                                       {"I32", 4},
                                                                       {"I16", 2},
                                                                       {"I8", 1},
                                                                       {"U8", 1},
                                                                       {"BOOL", 1}}};

/// An integer that is not negative and fits 63 bits.
bool read_count(const Json& value, std::uint64_t& count) {
  if (!value.is_number_unsigned()) return false;
  count = value.get<std::uint64_t>();
  return count <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
}

SafetensorsItem read_item(const std::string& name, const Json& value) {
  SafetensorsItem item;
  DUALPIPE_CHECK(value.is_object() && value.size() == 3 && value.contains("dtype") && value.contains("shape") &&
                     value.contains("data_offsets"),
                 "tensor ", name, " must be an object of dtype, shape and data_offsets, got ", brief(value));
  const Json& dtype = value["dtype"];
  DUALPIPE_CHECK(dtype.is_string(), "tensor ", name, ": dtype must be a string, got ", brief(dtype));
  item.dtype = dtype.get<std::string>();
  const auto element = static_cast<std::uint64_t>(safetensors_item_bytes(item.dtype));
  DUALPIPE_CHECK(element > 0, "tensor ", name, " has dtype ", brief(dtype), "; known are ", safetensors_dtypes());

  const Json& shape = value["shape"];
  DUALPIPE_CHECK(shape.is_array(), "tensor ", name, ": shape must be a list, got ", brief(shape));
  std::uint64_t bytes = element;
  bool empty = false;
  for (const Json& each : shape) {
    std::uint64_t size = 0;
    DUALPIPE_CHECK(read_count(each, size), "tensor ", name, ": sizes must be integers >= 0, got ", brief(shape));
    item.sizes.push_back(static_cast<std::int64_t>(size));
    if (size == 0) empty = true;
    DUALPIPE_CHECK(size == 0 || bytes <= std::numeric_limits<std::int64_t>::max() / size, "tensor ", name,
                   ": the sizes ", brief(shape), " are more than any file holds");
    if (size > 0) bytes *= size;
  }
  if (empty) bytes = 0;

  const Json& offsets = value["data_offsets"];
  DUALPIPE_CHECK(offsets.is_array() && offsets.size() == 2 && read_count(offsets[0], item.begin) &&
                     read_count(offsets[1], item.end) && item.begin <= item.end,
                 "tensor ", name, ": data_offsets must be two ascending integers >= 0, got ", brief(offsets));
  DUALPIPE_CHECK(item.end - item.begin == bytes, "tensor ", name, ": ", item.dtype, " of sizes ", brief(shape),
                 " takes ", bytes, " bytes, its data_offsets ", brief(offsets), " are ", item.end - item.begin);
  return item;
}

std::map<std::string, std::string> read_metadata(const Json& value) {
  DUALPIPE_CHECK(value.is_object(), "__metadata__ must be an object, got ", brief(value));
  std::map<std::string, std::string> metadata;
  for (const auto& [key, text] : value.items()) {
    DUALPIPE_CHECK(text.is_string(), "__metadata__ holds strings only, got ", brief(text), " for ", brief(key));
    metadata.emplace(key, text.get<std::string>());
  }
  return metadata;
}

}  // namespace

int safetensors_item_bytes(std::string_view dtype) {
  for (const auto& [name, bytes] : kItemBytes)
    if (name == dtype) return bytes;
  return 0;
}

std::string safetensors_dtypes() {
  std::string names;
  for (const auto& entry : kItemBytes) names += str(names.empty() ? "" : ", ", entry.first);
  return names;
}

std::uint64_t safetensors_header_bytes(std::string_view first_eight, std::uint64_t file_bytes) {
  DUALPIPE_CHECK(first_eight.size() == 8,
                 "a safetensors file begins with 8 bytes that say how long its header is, got ", first_eight.size(),
                 " bytes");
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i)
    length = length << 8 | static_cast<unsigned char>(first_eight[static_cast<std::size_t>(i)]);
  DUALPIPE_CHECK(length <= max_safetensors_header, "no safetensors file: its header would have ", length,
                 " bytes, the format allows ", max_safetensors_header);
  DUALPIPE_CHECK(length <= file_bytes - 8, "the file is cut off: ", file_bytes,
                 " bytes, of which the header alone has ", length, " after the first 8");
  return length;
}

SafetensorsHeader parse_safetensors_header(std::string_view text, std::uint64_t data_bytes) {
  DUALPIPE_CHECK(text.starts_with('{'), "the header of a safetensors file begins with {");
  const Json json = parse_json(text);
  SafetensorsHeader header;
  std::vector<std::pair<std::uint64_t, const SafetensorsItem*>> order;
  std::map<const SafetensorsItem*, std::string> names;
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__") {
      header.metadata = read_metadata(value);
      continue;
    }
    const std::string shown = brief(name);
    const SafetensorsItem& item = header.tensors.emplace(name, read_item(shown, value)).first->second;
    order.emplace_back(item.end, &item);
    names.emplace(&item, shown);
  }
  // Sorted by end, empty tensors lie where the one before them ends.
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first, a.second->begin) < std::pair(b.first, b.second->begin);
  });
  std::uint64_t covered = 0;
  for (const auto& [end, item] : order) {
    DUALPIPE_CHECK(item->begin == covered, "tensor ", names.at(item), " begins at byte ", item->begin,
                   " of the data, where ", covered, " was expected: there is a hole or an overlap");
    covered = end;
  }
  DUALPIPE_CHECK(covered == data_bytes,
                 covered < data_bytes ? "the file is too long: " : "the file is cut off: ", "its tensors have ",
                 covered, " bytes, its data ", data_bytes);
  return header;
}

std::string lay_out_safetensors(SafetensorsHeader& header) {
  std::vector<std::pair<int, std::string>> order;
  for (const auto& [name, item] : header.tensors) {
    DUALPIPE_CHECK(name != "__metadata__", "no tensor of a safetensors file can be named __metadata__");
    order.emplace_back(-safetensors_item_bytes(item.dtype), name);
  }
  std::sort(order.begin(), order.end());
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!header.metadata.empty()) json["__metadata__"] = header.metadata;
  std::uint64_t offset = 0;
  for (const auto& [negative, name] : order) {
    SafetensorsItem& item = header.tensors.at(name);
    item.begin = offset;
    std::uint64_t bytes = static_cast<std::uint64_t>(-negative);
    for (const std::int64_t size : item.sizes) bytes *= static_cast<std::uint64_t>(size);
    item.end = offset += bytes;
    json[name] = {{"dtype", item.dtype}, {"shape", item.sizes}, {"data_offsets", {item.begin, item.end}}};
  }
  std::string text;
  try {
    text = json.dump();
  } catch (const nlohmann::json::exception& error) {
    throw InvalidArgument(str("a name or the metadata is no UTF-8: ", error.what()));
  }
  text.append((8 - text.size() % 8) % 8, ' ');
  DUALPIPE_CHECK(text.size() <= max_safetensors_header, "the header of a safetensors file would have ", text.size(),
                 " bytes, the format allows ", max_safetensors_header, "; write fewer tensors into one file");
  std::string length(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(text.size() >> (8 * i) & 0xff);
  return length + text;
}

}  // namespace dualpipe::detail
