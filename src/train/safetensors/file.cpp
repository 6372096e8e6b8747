#include "train/safetensors/file.hpp"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <system_error>
#include <utility>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/train/safetensors.hpp"
#include "train/safetensors/header.hpp"

namespace dualpipe {
namespace {

static_assert(std::endian::native == std::endian::little,
              "safetensors files are little-endian, and so are its tensors");

constexpr std::array<std::pair<std::string_view, at::ScalarType>, 10> kDtypes{{{"F64", at::kDouble},
                                                                               {"F32", at::kFloat},
                                                                               {"F16", at::kHalf},
                                                                               {"BF16", at::kBFloat16},
                                                                               {"I64", at::kLong},
                                                                               {"I32", at::kInt},
                                                                               {"I16", at::kShort},
                                                                               {"I8", at::kChar},
                                                                               {"U8", at::kByte},
                                                                               {"BOOL", at::kBool}}};

at::ScalarType dtype_of(std::string_view name) {
  for (const auto& [known, dtype] : kDtypes)
    if (known == name) return dtype;
  throw InvalidArgument(detail::str("no dtype ", name));  // the header was parsed, so this does not happen
}

}  // namespace

/// An open file and where its tensors lie.
class SafetensorsFile::Source {
 public:
  explicit Source(std::string path) : path_(std::move(path)), file_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (file_ < 0) fail(errno);
  }
  ~Source() {
    if (file_ >= 0) ::close(file_);
  }
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;

  const detail::SafetensorsHeader& parse() {
    struct stat status{};
    if (::fstat(file_, &status) != 0) fail(errno);
    DUALPIPE_CHECK(S_ISREG(status.st_mode), "cannot read ", path_, ": it is no regular file");
    const auto file_bytes = static_cast<std::uint64_t>(status.st_size);
    try {
      std::string first(std::min<std::uint64_t>(8, file_bytes), '\0');
      read(first.data(), first.size(), 0);
      std::string text(detail::safetensors_header_bytes(first, file_bytes), '\0');
      read(text.data(), text.size(), 8);
      data_ = 8 + text.size();
      header_ = detail::parse_safetensors_header(text, file_bytes - data_);
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(path_ + ": " + error.what());
    }
    return header_;
  }

  at::Tensor tensor(const std::string& name) const {
    const auto found = header_.tensors.find(name);
    DUALPIPE_CHECK(found != header_.tensors.end(), path_, " has no tensor ", name);
    const detail::SafetensorsItem& item = found->second;
    at::Tensor tensor = at::empty(item.sizes, at::TensorOptions().dtype(dtype_of(item.dtype)));
    read(static_cast<char*>(tensor.mutable_data_ptr()), item.end - item.begin, data_ + item.begin);
    return tensor;
  }

 private:
  void read(char* bytes, std::uint64_t count, std::uint64_t offset) const {
    while (count > 0) {
      const ssize_t part = ::pread(file_, bytes, count, static_cast<off_t>(offset));
      if (part < 0 && errno == EINTR) continue;
      if (part < 0) fail(errno);
      DUALPIPE_CHECK(part > 0, "cannot read ", path_, ": it became shorter");
      bytes += part;
      offset += static_cast<std::uint64_t>(part);
      count -= static_cast<std::uint64_t>(part);
    }
  }
  [[noreturn]] void fail(int error) const {
    throw InvalidArgument(detail::str("cannot read ", path_, ": ", std::generic_category().message(error)));
  }

  std::string path_;
  int file_;
  std::uint64_t data_ = 0;
  detail::SafetensorsHeader header_;
};

SafetensorsFile::SafetensorsFile(const std::string& path) {
  auto source = std::make_shared<Source>(path);
  const detail::SafetensorsHeader& header = source->parse();
  for (const auto& [name, item] : header.tensors) entries_[name] = {dtype_of(item.dtype), item.sizes};
  metadata_ = header.metadata;
  source_ = std::move(source);
}

at::Tensor SafetensorsFile::read(const std::string& name) const { return source_->tensor(name); }

namespace detail {

std::string safetensors_dtype(const std::string& what, const at::Tensor& tensor) {
  DUALPIPE_CHECK(tensor.defined() && tensor.layout() == at::kStrided, what, " is ",
                 tensor.defined() ? "not dense" : "undefined", ", which a safetensors file cannot hold");
  for (const auto& [name, dtype] : kDtypes)
    if (dtype == tensor.scalar_type()) return std::string(name);
  throw InvalidArgument(
      str(what, " has dtype ", tensor.dtype().name(), "; a safetensors file holds ", safetensors_dtypes()));
}

void stream_safetensors(const std::map<std::string, at::Tensor>& tensors,
                        const std::map<std::string, std::string>& metadata,
                        const std::function<void(std::string_view)>& sink) {
  at::NoGradGuard no_grad;
  SafetensorsHeader header{{}, metadata};
  std::map<std::uint64_t, const at::Tensor*> order;
  for (const auto& [name, tensor] : tensors)
    header.tensors[name] = {safetensors_dtype("tensor " + name, tensor), tensor.sizes().vec()};
  sink(lay_out_safetensors(header));
  for (const auto& [name, tensor] : tensors)
    if (tensor.numel() > 0) order[header.tensors.at(name).begin] = &tensor;
  for (const auto& [begin, tensor] : order) {
    const at::Tensor flat = tensor->detach().cpu().contiguous();
    sink({static_cast<const char*>(flat.const_data_ptr()), flat.nbytes()});
  }
}

}  // namespace detail

void write_safetensors(const std::string& path, const std::map<std::string, at::Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  detail::AtomicFile file(path);
  detail::stream_safetensors(tensors, metadata, [&](std::string_view bytes) { file.write(bytes); });
  file.commit();
}

}  // namespace dualpipe
