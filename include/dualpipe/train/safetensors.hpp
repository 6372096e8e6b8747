#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace dualpipe {

/// A safetensors file, the format in which Hugging Face keeps weights, opened for reading. Only its header is in
/// memory. Dtypes: F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL.
class SafetensorsFile {
 public:
  /// What the file says about a tensor.
  struct Entry {
    at::ScalarType dtype = at::ScalarType::Float;
    std::vector<std::int64_t> sizes;
    bool operator==(const Entry&) const = default;
  };

  /// Strict: the header must describe every byte of the file, once.
  ///
  /// @throws InvalidArgument  with the path: a file that cannot be read, is cut off or too long, has another dtype, or
  ///                          is no safetensors file.
  explicit SafetensorsFile(const std::string& path);

  const std::map<std::string, Entry>& tensors() const noexcept { return entries_; }
  const std::map<std::string, std::string>& metadata() const noexcept { return metadata_; }
  /// From the file, to the CPU. From any thread.
  ///
  /// @throws InvalidArgument  there is no such tensor, or the file cannot be read.
  at::Tensor read(const std::string& name) const;

 private:
  class Source;
  std::shared_ptr<const Source> source_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

/// Writes a file that appears whole or not at all. Tensors of any device, dense; those on the CPU that are contiguous
/// are not copied. Tensors that share memory are written once each.
///
/// @throws InvalidArgument  a tensor that is undefined, not dense or of another dtype than SafetensorsFile reads; a path
///                          that cannot be written.
void write_safetensors(const std::string& path, const std::map<std::string, at::Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace dualpipe
