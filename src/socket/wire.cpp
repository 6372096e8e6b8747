#include "socket/wire.hpp"

#include <ATen/ATen.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

namespace dualpipe::detail::wire {
namespace {

constexpr std::uint64_t longest_head = 16 << 20;
constexpr std::size_t longest_reason = 64 << 10;

class Writer {
 public:
  template <class T>
  void put(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void put_text(std::string_view text) {
    put(static_cast<std::uint32_t>(text.size()));
    bytes_ += text;
  }
  /// The frame, with the prefix in its reserved place.
  std::string finish(Kind kind, std::uint64_t payload_bytes) {
    Prefix prefix;
    prefix.kind = kind;
    prefix.head_bytes = bytes_.size() - sizeof prefix;
    prefix.payload_bytes = payload_bytes;
    std::memcpy(bytes_.data(), &prefix, sizeof prefix);
    return std::move(bytes_);
  }

 private:
  std::string bytes_ = std::string(sizeof(Prefix), '\0');
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}
  template <class T>
  T get() {
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string get_text() { return std::string(take(get<std::uint32_t>())); }
  /// The count of the items that follow, each of at least `size` bytes.
  std::size_t get_count(std::size_t size) {
    const auto count = get<std::uint32_t>();
    if (count > bytes_.size() / size)
      throw Malformed(str("a head of ", bytes_.size(), " bytes announces ", count, " items"));
    return count;
  }
  void finish() const {
    if (!bytes_.empty()) throw Malformed(str("a head is ", bytes_.size(), " bytes too long"));
  }

 private:
  std::string_view take(std::size_t size) {
    if (size > bytes_.size()) throw Malformed(str("a head ends ", size - bytes_.size(), " bytes too early"));
    const std::string_view taken = bytes_.substr(0, size);
    bytes_.remove_prefix(size);
    return taken;
  }
  std::string_view bytes_;
};

std::size_t element_size(at::ScalarType dtype) {
  const auto number = static_cast<int>(dtype);
  if (number < 0 || number >= static_cast<int>(at::ScalarType::Undefined))
    throw Malformed(str("there is no dtype of number ", number));
  return c10::elementSize(dtype);
}

}  // namespace

std::string message_frame(const Header& header, std::uint64_t payload_bytes) {
  Writer out;
  out.put(header.group);
  out.put(header.channel);
  out.put(header.epoch);
  out.put(header.sequence);
  out.put(header.issued_ns);
  out.put_text(header.operation);
  out.put(header.tensors_follow);
  out.put(static_cast<std::uint32_t>(header.signature.size()));
  for (const TensorSignature& tensor : header.signature) {
    out.put(tensor.defined);
    out.put(tensor.requires_grad);
    out.put(tensor.dtype);
    out.put(static_cast<std::uint32_t>(tensor.sizes.size()));
    for (const std::int64_t size : tensor.sizes) out.put(size);
  }
  return out.finish(Kind::message, payload_bytes);
}

std::string abort_frame(int origin, std::string_view reason) {
  Writer out;
  out.put(static_cast<std::int32_t>(origin));
  out.put_text(reason.substr(0, longest_reason));
  return out.finish(Kind::abort, 0);
}

std::string goodbye_frame() { return Writer().finish(Kind::goodbye, 0); }

Prefix read_prefix(std::string_view bytes) {
  Reader in(bytes);
  const auto prefix = in.get<Prefix>();
  const bool known = prefix.kind == Kind::message || prefix.kind == Kind::abort || prefix.kind == Kind::goodbye;
  if (prefix.magic != Prefix().magic || !known || prefix.head_bytes > longest_head)
    throw Malformed(str("a frame begins with ", prefix.magic, " ", static_cast<std::uint32_t>(prefix.kind), " ",
                        prefix.head_bytes));
  return prefix;
}

Header read_header(std::string_view head) {
  Reader in(head);
  Header header;
  header.group = in.get<std::int64_t>();
  header.channel = in.get<Channel>();
  if (header.channel != Channel::transfer && header.channel != Channel::collective)
    throw Malformed(str("there is no channel ", static_cast<int>(header.channel)));
  header.epoch = in.get<std::int32_t>();
  header.sequence = in.get<std::uint64_t>();
  header.issued_ns = in.get<std::int64_t>();
  header.operation = in.get_text();
  header.tensors_follow = in.get<char>() != 0;
  header.signature.resize(in.get_count(2 * sizeof(char) + sizeof(at::ScalarType) + sizeof(std::uint32_t)));
  for (TensorSignature& tensor : header.signature) {
    tensor.defined = in.get<char>() != 0;
    tensor.requires_grad = in.get<char>() != 0;
    tensor.dtype = in.get<at::ScalarType>();
    tensor.sizes.resize(in.get_count(sizeof(std::int64_t)));
    for (std::int64_t& size : tensor.sizes) size = in.get<std::int64_t>();
  }
  in.finish();
  return header;
}

Abort read_abort(std::string_view head) {
  Reader in(head);
  Abort abort;
  abort.origin = in.get<std::int32_t>();
  abort.reason = in.get_text();
  in.finish();
  return abort;
}

Tensors allocate(const Header& header, std::uint64_t payload_bytes) {
  // All checks come before any allocation: a malformed head must not exhaust memory.
  std::uint64_t total = 0;
  for (const TensorSignature& tensor : header.signature) {
    if (!tensor.defined) continue;
    std::uint64_t bytes = element_size(tensor.dtype);
    bool too_large = false;
    for (const std::int64_t size : tensor.sizes) {
      too_large = too_large || size < 0 || __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(size), &bytes);
    }
    if (too_large || __builtin_add_overflow(total, bytes, &total))
      throw Malformed("a message announces " + to_string(header.signature));
  }
  if (!header.tensors_follow) total = 0;
  if (total != payload_bytes)
    throw Malformed(str("a message announces ", to_string(header.signature), " and ", payload_bytes, " bytes"));

  Tensors tensors;
  if (!header.tensors_follow) return tensors;
  tensors.reserve(header.signature.size());
  for (const TensorSignature& tensor : header.signature)
    tensors.push_back(tensor.defined ? at::empty(tensor.sizes, tensor.dtype) : at::Tensor());
  return tensors;
}

std::uint64_t payload_bytes(const Tensors& tensors) {
  std::uint64_t total = 0;
  for (const at::Tensor& tensor : tensors) total += tensor.defined() ? tensor.nbytes() : 0;
  return total;
}

}  // namespace dualpipe::detail::wire
