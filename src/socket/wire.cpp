#include "socket/wire.hpp"

#include <ATen/ATen.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

namespace dualpipe::detail::wire {
namespace {

constexpr std::uint64_t longest_head = 64 << 20;  // a failure's: the ballots of the last step of each group
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

void put_ranks(Writer& out, const std::set<int>& ranks) {
  out.put(static_cast<std::uint32_t>(ranks.size()));
  for (const int rank : ranks) out.put(static_cast<std::int32_t>(rank));
}

std::set<int> get_ranks(Reader& in) {
  std::set<int> ranks;
  for (std::size_t left = in.get_count(sizeof(std::int32_t)); left > 0; --left) ranks.insert(in.get<std::int32_t>());
  return ranks;
}

void put_word(Writer& out, const Word& word) {
  out.put(word.decided);
  put_ranks(out, word.lost);
  put_ranks(out, word.suspected);
  out.put(static_cast<std::uint32_t>(word.over.size()));
  for (const auto& [group, last] : word.over) {
    out.put(group.number);
    out.put(static_cast<std::int32_t>(group.lowest));
    out.put(last.step);
    out.put(static_cast<std::uint32_t>(last.ballots.size()));
    for (const std::string& ballot : last.ballots) out.put_text(ballot);
  }
}

Word get_word(Reader& in) {
  Word word;
  word.decided = in.get<char>() != 0;
  word.lost = get_ranks(in);
  word.suspected = get_ranks(in);
  constexpr std::size_t least = sizeof(std::int64_t) + sizeof(std::int32_t) + sizeof(std::uint64_t);
  for (std::size_t left = in.get_count(least); left > 0; --left) {
    GroupName group;
    group.number = in.get<std::int64_t>();
    group.lowest = in.get<std::int32_t>();
    LastStep& last = word.over[group];
    last.step = in.get<std::uint64_t>();
    last.ballots.resize(in.get_count(sizeof(std::uint32_t)));
    for (std::string& ballot : last.ballots) ballot = in.get_text();
  }
  return word;
}

std::size_t element_size(at::ScalarType dtype) {
  const auto number = static_cast<int>(dtype);
  if (number < 0 || number >= static_cast<int>(at::ScalarType::Undefined))
    throw Malformed(str("there is no dtype of number ", number));
  return c10::elementSize(dtype);
}

/// For an error message: what a peer announces may be long.
std::string announced(const Signature& signature) {
  constexpr std::size_t longest = 200;
  const std::string text = to_string(signature);
  return text.size() <= longest ? text : text.substr(0, longest) + " and more";
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

std::string vote_frame(const Vote& vote) {
  Writer out;
  out.put(vote.group);
  out.put(vote.step);
  out.put_text(vote.ballot);
  return out.finish(Kind::vote, 0);
}

std::string failure_frame(const Failure& failure) {
  Writer out;
  out.put(static_cast<std::int32_t>(failure.origin));
  out.put_text(std::string_view(failure.reason).substr(0, longest_reason));
  put_word(out, failure.word);
  return out.finish(Kind::failure, 0);
}

std::string goodbye_frame(const Goodbye& goodbye) {
  Writer out;
  out.put(goodbye.unwound);
  put_word(out, goodbye.word);
  return out.finish(Kind::goodbye, 0);
}

std::string beat_frame() { return Writer().finish(Kind::beat, 0); }
std::string question_frame() { return Writer().finish(Kind::question, 0); }

std::string answer_frame(const RankActivity& activity) {
  Writer out;
  out.put(static_cast<std::uint32_t>(activity.waits_for.size()));
  for (const int rank : activity.waits_for) out.put(static_cast<std::int32_t>(rank));
  out.put_text(activity.operation);
  out.put(activity.seconds);
  return out.finish(Kind::answer, 0);
}

Prefix read_prefix(std::string_view bytes) {
  Reader in(bytes);
  const auto prefix = in.get<Prefix>();
  const bool known = prefix.kind >= Kind::message && prefix.kind <= Kind::answer;
  const bool too_long = prefix.head_bytes > longest_head || (prefix.kind != Kind::message && prefix.payload_bytes != 0);
  if (prefix.magic != Prefix().magic || !known || too_long)
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

Vote read_vote(std::string_view head) {
  Reader in(head);
  Vote vote;
  vote.group = in.get<std::int64_t>();
  vote.step = in.get<std::uint64_t>();
  vote.ballot = in.get_text();
  in.finish();
  return vote;
}

Failure read_failure(std::string_view head) {
  Reader in(head);
  Failure failure;
  failure.origin = in.get<std::int32_t>();
  failure.reason = in.get_text();
  failure.word = get_word(in);
  in.finish();
  return failure;
}

RankActivity read_answer(std::string_view head) {
  Reader in(head);
  RankActivity activity;
  activity.waits_for.resize(in.get_count(sizeof(std::int32_t)));
  for (int& rank : activity.waits_for) rank = in.get<std::int32_t>();
  activity.operation = in.get_text();
  activity.seconds = in.get<double>();
  in.finish();
  return activity;
}

Goodbye read_goodbye(std::string_view head) {
  Reader in(head);
  Goodbye goodbye;
  goodbye.unwound = in.get<char>() != 0;
  goodbye.word = get_word(in);
  in.finish();
  return goodbye;
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
      throw Malformed("a message announces " + announced(header.signature));
  }
  if (!header.tensors_follow) total = 0;
  if (total != payload_bytes)
    throw Malformed(str("a message announces ", announced(header.signature), " and ", payload_bytes, " bytes"));

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
