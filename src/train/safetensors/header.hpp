#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace dualpipe::detail {

inline constexpr std::uint64_t max_safetensors_header = 100'000'000;

/// A tensor as the header of a safetensors file describes it.
struct SafetensorsItem {
  std::string dtype;  ///< "F32", one of those that safetensors_item_bytes knows
  std::vector<std::int64_t> sizes;
  std::uint64_t begin = 0, end = 0;  ///< bytes of the data, which follow the header
};

struct SafetensorsHeader {
  std::map<std::string, SafetensorsItem> tensors;
  std::map<std::string, std::string> metadata;
};

/// Bytes of one element; 0: a dtype that is not supported.
int safetensors_item_bytes(std::string_view dtype);
/// "F64, F32, …"
std::string safetensors_dtypes();

/// Length of the header, from the first eight bytes of a file of `file_bytes`.
///
/// @throws InvalidArgument  the length is more than the format or the file allows.
std::uint64_t safetensors_header_bytes(std::string_view first_eight, std::uint64_t file_bytes);
/// @param text        the header.
/// @param data_bytes  of the file, after the header. The tensors must fill them without holes or overlaps.
/// @throws InvalidArgument  anything else than the format says, with the name of the tensor.
SafetensorsHeader parse_safetensors_header(std::string_view text, std::uint64_t data_bytes);

/// The header of a file, with its length in front, for tensors whose `begin` and `end` are not set yet: those with the
/// largest elements come first, so that all are aligned. The length is a multiple of 8.
std::string lay_out_safetensors(SafetensorsHeader& header);

}  // namespace dualpipe::detail
