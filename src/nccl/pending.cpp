#include "nccl/pending.hpp"

#include <algorithm>

namespace dualpipe::detail {

NcclPending::NcclPending(std::shared_ptr<NcclContext> context, Parts parts)
    : context_(std::move(context)), parts_(std::move(parts)) {
  if (parts_.queue) context_->submit(*parts_.queue, parts_.operation);
}

void NcclPending::wait() {
  NcclOperation& operation = *parts_.operation;
  if (parts_.queue) {
    context_->await_launch(*parts_.queue, operation);
    context_->check(operation.request);
  } else {
    context_->transport().wait(operation.headers, operation.request);
  }
  if (operation.end) {
    if (!finished_) context_->watch(parts_.operation);
    context_->on_device(operation.request,
                        [&](DeviceApi& device) { device.wait(device.current_stream(), operation.end.get()); });
    context_->check(operation.request);  // a stream that is the host may have returned because of an abort
  }
  if (!std::exchange(finished_, true)) finish();
}

void NcclPending::synchronize() {
  wait();
  context_->synchronize(*parts_.operation);
}

void NcclPending::finish() {
  NcclOperation& operation = *parts_.operation;
  if (const auto problem = parts_.watched.written())
    context_->transport().raise(context_->transport().rank(), operation.request, *problem);
  // The allocator gives the memory back to the stream of the call. If another stream waits, both must be ordered: this
  // one behind the caller's earlier work, the caller's behind the work below.
  const bool elsewhere = parts_.queue && context_->device().current_stream() != operation.caller;
  if (elsewhere) order(context_->device().current_stream(), operation.ready);
  const c10::NoGradGuard no_grad;
  const Finish finish = std::exchange(parts_.finish, nullptr);
  if (finish) result_ = finish(operation);
  if (elsewhere) order(operation.caller, context_->record(context_->device().current_stream(), operation.request));
  operation.sources.clear();
  operation.targets.clear();
}

void NcclPending::order(DeviceStream stream, const EventPtr& event) {
  context_->on_device(parts_.operation->request, [&](DeviceApi& device) { device.wait(stream, event.get()); });
}

bool NcclPending::launched() const {
  const NcclOperation& operation = *parts_.operation;
  return parts_.queue ? context_->launched(*parts_.queue, operation) : context_->transport().done(operation.headers);
}

bool NcclPending::done() const {
  const NcclOperation& operation = *parts_.operation;
  const auto over = [&](DeviceApi& device) { return device.done(operation.end.get()); };
  if (launched() && (!operation.end || context_->on_device(operation.request, over))) return true;
  const bool never = !operation.launched && operation.waits_for_headers &&
                     context_->transport().done(operation.headers) &&
                     !context_->transport().succeeded(operation.headers);
  return never || context_->failed();
}

Tensors NcclPending::take() {
  wait();
  DUALPIPE_CHECK(!std::exchange(taken_, true), parts_.operation->request.describe(), ": its tensors were taken before");
  return std::move(result_);
}

Span NcclPending::span() const {
  const NcclOperation& operation = *parts_.operation;
  std::int64_t came = operation.request.header.issued_ns;
  for (const auto& header : operation.headers)
    if (context_->transport().succeeded({&header, 1})) came = std::max(came, header->message.header.issued_ns);
  const double both = static_cast<double>(came) * 1e-9;
  return context_->on_device(operation.request, [&](DeviceApi& device) -> Span {
    if (!operation.end || !device.done(operation.end.get())) return {both, both};
    if (!operation.begin) return {both, both};
    const double end = device.time_of(operation.end.get());
    if (operation.shortest) return {end - *operation.shortest, end};
    const double begin = std::max(both, device.time_of(operation.begin.get()));
    return {begin, std::max(begin, end)};
  });
}

}  // namespace dualpipe::detail
