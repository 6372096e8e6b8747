// Headers of safetensors files: what is read fills the data without holes and is written so that it is read the same,
// or it is refused.
#include <map>
#include <string>

#include "dualpipe/error.hpp"
#include "fuzz/target.hpp"
#include "train/safetensors/header.hpp"

namespace dualpipe::fuzz {

void read(std::string_view file) {
  try {
    const std::string_view first = file.substr(0, 8);
    const std::uint64_t length = detail::safetensors_header_bytes(first, file.size());
    const std::uint64_t data = file.size() - 8 - length;
    detail::SafetensorsHeader header = detail::parse_safetensors_header(file.substr(8, length), data);
    std::uint64_t sum = 0;
    for (const auto& [name, item] : header.tensors) {
      require(item.begin <= item.end && item.end <= data, "a tensor lies within the data");
      sum += item.end - item.begin;
    }
    require(sum == data, "tensors fill the data");
    if (header.tensors.contains("__metadata__")) return;
    const std::string written = detail::lay_out_safetensors(header);
    const detail::SafetensorsHeader again = detail::parse_safetensors_header(std::string_view(written).substr(8), data);
    require(again.metadata == header.metadata, "metadata are read as they were written");
    require(again.tensors.size() == header.tensors.size(), "so many tensors as were written");
    for (const auto& [name, item] : header.tensors) {
      const auto& other = again.tensors.at(name);
      require(other.dtype == item.dtype && other.sizes == item.sizes && other.begin == item.begin,
              "a tensor is read as it was written");
    }
  } catch (const InvalidArgument& error) {
    require_readable(error.what());
  }
}

}  // namespace dualpipe::fuzz
