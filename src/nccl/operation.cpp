#include "nccl/operation.hpp"

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
    family_->transport().wait(flight.headers, flight.whole);
  }
  if (flight.end) {
    if (!finished_) family_->watch(parts_.flight);
    family_->on_device(flight.whole,
                       [&](DeviceApi& device) { device.wait(device.current_stream(), flight.end.get()); });
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
    family_->transport().raise(family_->transport().rank(), flight.whole, *problem);
  // Memory goes back to the stream where it was allocated, so that this one must have waited for the transfer as well,
  // and for what follows it here.
  const bool elsewhere = parts_.queue && family_->device().current_stream() != flight.caller;
  if (elsewhere) order(family_->device().current_stream(), flight.ready);
  const c10::NoGradGuard no_grad;
  const Finish finish = std::exchange(parts_.finish, nullptr);
  if (finish) result_ = finish(flight);
  if (elsewhere) order(flight.caller, family_->record(family_->device().current_stream(), flight.whole));
  flight.sources.clear();
  flight.targets.clear();
}

void NcclOperation::order(DeviceStream stream, const EventPtr& event) {
  family_->on_device(parts_.flight->whole, [&](DeviceApi& device) { device.wait(stream, event.get()); });
}

bool NcclOperation::launched() const {
  const Flight& flight = *parts_.flight;
  return parts_.queue ? family_->launched(*parts_.queue, flight) : family_->transport().done(flight.headers);
}

bool NcclOperation::done() const {
  const Flight& flight = *parts_.flight;
  const auto over = [&](DeviceApi& device) { return device.done(flight.end.get()); };
  if (launched() && (!flight.end || family_->on_device(flight.whole, over))) return true;
  const bool never = !flight.launched && flight.waits_for_headers && family_->transport().done(flight.headers) &&
                     !family_->transport().succeeded(flight.headers);
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
    if (family_->transport().succeeded({&header, 1})) came = std::max(came, header->message.header.issued_ns);
  const double both = static_cast<double>(came) * 1e-9;
  return family_->on_device(flight.whole, [&](DeviceApi& device) -> Span {
    if (!flight.end || !device.done(flight.end.get())) return {both, both};
    const double begin = std::max(both, device.time_of(flight.begin.get()));
    return {begin, std::max(begin, device.time_of(flight.end.get()))};
  });
}

}  // namespace dualpipe::detail
