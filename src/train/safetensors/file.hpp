#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <string>
#include <string_view>

namespace dualpipe::detail {

/// "F32" @throws InvalidArgument  naming `what`: undefined, not dense, or a dtype that the format lacks here.
std::string safetensors_dtype(const std::string& what, const at::Tensor& tensor);
/// Gives the bytes of a safetensors file to `sink`, piece by piece.
void stream_safetensors(const std::map<std::string, at::Tensor>& tensors,
                        const std::map<std::string, std::string>& metadata,
                        const std::function<void(std::string_view)>& sink);

}  // namespace dualpipe::detail
