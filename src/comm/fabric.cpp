#include <algorithm>
#include <utility>

#include "comm/mesh.hpp"

namespace dualpipe::detail {
namespace {

/// Whether nobody but `tensor` can reach its memory, and none of that memory is wasted. Memory without an allocator
/// (at::from_blob) belongs to somebody whom reference counts do not show.
bool exclusive(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  return storage.use_count() == 1 && storage.allocator() != nullptr && tensor.storage_offset() == 0 &&
         storage.nbytes() == tensor.nbytes();
}

void check_dense(const at::Tensor& tensor, std::size_t index) {
  DUALPIPE_CHECK(tensor.device().is_cpu(), "tensor ", index, " of the message is on ", tensor.device(),
                 "; this communicator moves CPU tensors: use connect_nccl or .cpu()");
  DUALPIPE_CHECK(tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested(), "tensor ", index,
                 " of the message has layout ", tensor.layout(), " and type ", tensor.toString(),
                 "; only dense tensors travel: use to_dense() or dequantize()");
}

bool all_done(std::span<const std::shared_ptr<Transfer>> transfers) {
  return std::all_of(transfers.begin(), transfers.end(), [](const auto& transfer) { return transfer->done; });
}

}  // namespace

std::int64_t now_ns() noexcept {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Watch::Watch(const Tensors& tensors) {
  versions_.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    // Undefined and inference tensors have no version.
    const bool versioned = tensor.defined() && !tensor.is_inference();
    const c10::VariableVersion version =
        versioned ? tensor.unsafeGetTensorImpl()->version_counter() : c10::VariableVersion();
    versions_.emplace_back(version, version.enabled() ? version.current_version() : 0);
  }
}

std::optional<std::string> Watch::written() const {
  for (std::size_t i = 0; i < versions_.size(); ++i) {
    const auto& [version, before] = versions_[i];
    if (version.enabled() && version.current_version() != before) {
      return str("tensor ", i, " was written in place while it was under way (version ", before, ", now ",
                 version.current_version(), "); call wait() before writing to it, or give a clone()");
    }
  }
  return std::nullopt;
}

std::shared_ptr<Parcel> Parcel::of_fresh(Tensors tensors) {
  auto parcel = std::make_shared<Parcel>();
  parcel->tensors_ = std::move(tensors);
  return parcel;
}

std::shared_ptr<Parcel> Parcel::of(const Tensors& tensors) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].defined()) check_dense(tensors[i], i);
  }
  const PlainTensors plain;
  auto parcel = std::make_shared<Parcel>();
  parcel->tensors_.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) {
      parcel->tensors_.emplace_back();
    } else if (tensor.is_inference()) {
      parcel->tensors_.push_back(tensor.resolve_conj().resolve_neg().clone(at::MemoryFormat::Contiguous));
    } else if (!tensor.is_conj() && !tensor.is_neg() && tensor.is_contiguous()) {
      parcel->tensors_.push_back(tensor.variable_data());  // nearly always; the general way costs four dispatches
    } else {
      parcel->tensors_.push_back(tensor.resolve_conj().resolve_neg().contiguous().variable_data());
    }
  }
  parcel->watch_ = Watch(tensors);
  return parcel;
}

void Parcel::settle() {
  const std::lock_guard lock(mutex_);
  const PlainTensors plain;
  for (at::Tensor& tensor : tensors_) {
    if (tensor.defined() && !exclusive(tensor)) tensor = tensor.clone(at::MemoryFormat::Contiguous);
  }
  // From now on the sender may write.
  if (!written_) written_ = watch_.written();
  watch_ = Watch();
}

Tensors Parcel::take() {
  settle();
  const std::lock_guard lock(mutex_);
  return std::exchange(tensors_, {});
}

void Parcel::release() {
  const std::lock_guard lock(mutex_);
  tensors_.clear();
}

std::optional<std::string> Parcel::written() const {
  const std::lock_guard lock(mutex_);
  return written_;
}

std::string Transfer::operation() const {
  if (header.channel == Channel::collective) return header.operation;
  return str(kind == Kind::send ? "send to rank " : "receive from rank ", peer);
}

std::string Transfer::describe() const {
  return str(operation(), header.channel == Channel::collective ? " (collective " : " (message ", header.sequence,
             " of group ", header.group, ")");
}

Transfer Transfer::without_message() const {
  Transfer copy;
  copy.kind = kind;
  copy.peer = peer;
  copy.header = header;
  return copy;
}

Transfer Transfer::collective(const Header& header) {
  Transfer whole;
  whole.kind = Transfer::Kind::receive;
  whole.header = header;
  return whole;
}

Fabric::Fabric(int rank, int size, std::chrono::milliseconds timeout, std::int32_t epoch)
    : rank_(rank),
      size_(size),
      // A deadline further away would leave the range of the clock.
      timeout_(std::min<std::chrono::milliseconds>(timeout, std::chrono::hours(24 * 365))),
      epoch_(epoch),
      departed_(static_cast<std::size_t>(size), false) {
  DUALPIPE_CHECK(timeout.count() > 0, "the timeout of a communicator must be positive, got ", timeout.count(), " ms");
}

std::shared_ptr<Transfer> Fabric::send(int to, Message message) {
  auto transfer = std::make_shared<Transfer>();
  transfer->kind = Transfer::Kind::send;
  transfer->peer = to;
  transfer->header = message.header;
  transfer->message.parcel = message.parcel;
  throw_if_failed(*transfer);
  start(to, std::move(message), transfer);
  return transfer;
}

std::shared_ptr<Transfer> Fabric::receive(int from, Header expected, bool any_signature) {
  auto transfer = std::make_shared<Transfer>();
  transfer->kind = Transfer::Kind::receive;
  transfer->peer = from;
  transfer->header = std::move(expected);
  transfer->any_signature = any_signature;
  throw_if_failed(*transfer);
  std::unique_lock lock(mutex_);
  Lane& lane = lanes_[{from, transfer->header.group, transfer->header.channel}];
  if (lane.arrived.empty()) {
    lane.posted.push_back(transfer);
    return transfer;
  }
  Message message = std::move(lane.arrived.front());
  lane.arrived.pop_front();
  meet(std::move(lock), *transfer, std::move(message));
  return transfer;
}

void Fabric::deliver(int from, Message message) {
  std::unique_lock lock(mutex_);
  Lane& lane = lanes_[{from, message.header.group, message.header.channel}];
  if (lane.posted.empty()) {
    lane.arrived.push_back(std::move(message));
    return;
  }
  const std::shared_ptr<Transfer> transfer = std::move(lane.posted.front());
  lane.posted.pop_front();
  meet(std::move(lock), *transfer, std::move(message));
}

void Fabric::meet(std::unique_lock<std::mutex> lock, Transfer& receive, Message message) {
  const std::string problem = disagreement(receive, message.header);
  const std::function<void()> accepted = std::exchange(message.accepted, nullptr);
  if (problem.empty()) {
    receive.message = std::move(message);
    receive.completed_ns = now_ns();
    receive.done = true;
  }
  lock.unlock();
  if (!problem.empty()) {
    abort(rank_, str("rank ", rank_, ": ", receive.describe(), ": ", problem));
    return;
  }
  notify();
  if (accepted) accepted();
}

std::string Fabric::disagreement(const Transfer& receive, const Header& got) {
  const Header& expected = receive.header;
  if (expected.epoch != got.epoch) {
    return str("expected epoch ", expected.epoch, ", got epoch ", got.epoch, " from rank ", receive.peer);
  }
  if (expected.operation != got.operation || expected.sequence != got.sequence) {
    return str("expected ", expected.operation, " ", expected.sequence, " ", to_string(expected.signature), ", got ",
               got.operation, " ", got.sequence, " ", to_string(got.signature), " from rank ", receive.peer,
               "; all ranks must call the same operations in the same order");
  }
  if (!receive.any_signature && expected.signature != got.signature) {
    return str("expected ", to_string(expected.signature), ", got ", to_string(got.signature), " from rank ",
               receive.peer);
  }
  return {};
}

void Fabric::complete(const std::shared_ptr<Transfer>& transfer) {
  {
    const std::lock_guard lock(mutex_);
    transfer->completed_ns = now_ns();
    transfer->done = true;
  }
  notify();
}

void Fabric::departed(int peer) {
  {
    const std::lock_guard lock(mutex_);
    departed_[static_cast<std::size_t>(peer)] = true;
  }
  notify();
}

bool Fabric::lost(const Transfer& transfer) const {
  return !transfer.done && departed_[static_cast<std::size_t>(transfer.peer)];
}

bool Fabric::done(std::span<const std::shared_ptr<Transfer>> transfers) const {
  const std::lock_guard lock(mutex_);
  if (failure_ || all_done(transfers) ||
      std::any_of(transfers.begin(), transfers.end(), [this](const auto& transfer) { return lost(*transfer); }))
    return true;
  waiting(true);
  waiting(false);
  return false;
}

bool Fabric::succeeded(std::span<const std::shared_ptr<Transfer>> transfers) const {
  const std::lock_guard lock(mutex_);
  return !failure_ && all_done(transfers);
}

void Fabric::wait(std::span<const std::shared_ptr<Transfer>> transfers, const Transfer& whole) {
  const auto deadline = std::chrono::steady_clock::now() + timeout_;
  std::unique_lock lock(mutex_);
  const Transfer* gone = nullptr;
  const auto over = [&] {
    for (const auto& transfer : transfers) {
      if (lost(*transfer)) gone = transfer.get();
    }
    return failure_ || gone != nullptr || all_done(transfers);
  };
  if (!over()) {
    waiting(true);
    changed_.wait_until(lock, deadline, over);
    waiting(false);
  }
  if (failure_) throw_failure(whole);
  if (gone != nullptr) {
    lock.unlock();
    raise(gone->peer, whole, str("rank ", gone->peer, " has left, having destroyed its communicator"));
  }
  std::string missing;
  int origin = -1;
  for (const auto& transfer : transfers) {
    if (transfer->done) continue;
    if (origin < 0) origin = transfer->peer;
    missing += str(missing.empty() ? "" : ", ", "rank ", transfer->peer);
  }
  if (missing.empty()) return;
  lock.unlock();
  raise(origin, whole, str("waited for ", missing, " longer than the timeout of ", timeout_.count(), " ms"));
}

void Fabric::abort(int origin, const std::string& reason) noexcept {
  if (fail(origin, reason)) spread(origin, reason);
}

void Fabric::failed(int origin, const std::string& reason) noexcept { fail(origin, reason); }

bool Fabric::has_failed() const {
  const std::lock_guard lock(mutex_);
  return failure_.has_value();
}

bool Fabric::fail(int origin, const std::string& reason) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (failure_) return false;
    failure_ = Failure{origin, reason};
  }
  notify();
  return true;
}

void Fabric::listen(std::weak_ptr<FabricListener> listener) {
  const std::lock_guard lock(mutex_);
  listener_ = std::move(listener);
  has_listener_ = true;
}

void Fabric::notify() noexcept {
  changed_.notify_all();
  if (!has_listener_) return;
  std::shared_ptr<FabricListener> listener;
  {
    const std::lock_guard lock(mutex_);
    listener = listener_.lock();
  }
  if (listener) listener->fabric_changed();
}

void Fabric::raise(int origin, const Transfer& transfer, const std::string& problem) {
  const std::string message = str("rank ", rank_, ": ", transfer.describe(), ": ", problem);
  abort(origin, message);
  throw CommError(origin, transfer.operation(), message);
}

void Fabric::throw_if_failed(const Transfer& transfer) const {
  const std::lock_guard lock(mutex_);
  if (failure_) throw_failure(transfer);
}

void Fabric::throw_failure(const Transfer& transfer) const {
  throw CommError(failure_->origin, transfer.operation(),
                  str("rank ", rank_, ": ", transfer.describe(), ": failed because of rank ", failure_->origin, ": ",
                      failure_->reason));
}

}  // namespace dualpipe::detail
