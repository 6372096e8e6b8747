#include "comm/nccl_operation.hpp"

#include <algorithm>

namespace dualpipe::detail {

NcclOperation::NcclOperation(std::shared_ptr<NcclFamily> family, Parts parts)
    : family_(std::move(family)), parts_(std::move(parts)) {
  if (parts_.queue) family_->submit(*parts_.queue, parts_.flight);
}

void NcclOperation::wait() {
  Flight& flight = *parts_.flight;
  if (parts_.queue) {
    family_->await_launch(*parts_.queue, flight);
    family_->check(flight.whole);
  } else {
    family_->fabric().wait(flight.headers, flight.whole);
  }
  DeviceApi& device = family_->device();
  if (flight.end) {
    if (!finished_) family_->watch(parts_.flight);
    device.wait(device.current_stream(), flight.end.get());
    family_->check(flight.whole);  // where that stream is the host, it may be back because of an abort
  }
  if (!std::exchange(finished_, true)) finish();
}

void NcclOperation::synchronize() {
  wait();
  family_->synchronize(*parts_.flight);
}

void NcclOperation::finish() {
  Flight& flight = *parts_.flight;
  if (const auto problem = parts_.watched.written())
    family_->fabric().raise(family_->fabric().rank(), flight.whole, *problem);
  const c10::NoGradGuard no_grad;
  if (parts_.finish) result_ = std::exchange(parts_.finish, nullptr)(flight);
  // Memory goes back to the stream where it was allocated, which has just been told to wait for the transfer. Another
  // stream has not: then the memory stays until the device is through.
  if (!flight.end || family_->device().current_stream() == flight.caller) {
    flight.sources.clear();
    flight.targets.clear();
  }
}

bool NcclOperation::launched() const {
  const Flight& flight = *parts_.flight;
  return parts_.queue ? family_->launched(*parts_.queue, flight) : family_->fabric().done(flight.headers);
}

bool NcclOperation::done() const {
  if (launched() && (!parts_.flight->end || family_->device().done(parts_.flight->end.get()))) return true;
  const Flight& flight = *parts_.flight;
  const bool never = !flight.launched && flight.waits_for_headers && family_->fabric().done(flight.headers) &&
                     !family_->fabric().succeeded(flight.headers);
  return never || family_->failed();
}

Tensors NcclOperation::take() {
  wait();
  DUALPIPE_CHECK(!std::exchange(taken_, true), parts_.flight->whole.describe(), ": its tensors were taken before");
  return std::move(result_);
}

Span NcclOperation::span() const {
  const Flight& flight = *parts_.flight;
  std::int64_t came = flight.whole.header.issued_ns;
  for (const auto& header : flight.headers)
    if (family_->fabric().succeeded({&header, 1})) came = std::max(came, header->message.header.issued_ns);
  const double both = static_cast<double>(came) * 1e-9;
  if (!flight.end || !family_->device().done(flight.end.get())) return {both, both};
  DeviceApi& device = family_->device();
  const double begin = std::max(both, device.time_of(flight.begin.get()));
  return {begin, std::max(begin, device.time_of(flight.end.get()))};
}

}  // namespace dualpipe::detail
