#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>

#include "dualpipe/detail/comm/transport.hpp"

// The Pendings of a MessageCommunicator.
namespace dualpipe::detail {

/// The requests of one call, and the caller's work when all of them are done.
class MessageOperation final : public Pending::State {
 public:
  using Finish = std::function<Tensors()>;

  /// @param whole    names the call in errors.
  /// @param watched  tensors that the caller must not write to before wait().
  MessageOperation(std::shared_ptr<Transport> transport, at::Device device, Request whole, Requests requests,
                   Watch watched, Finish finish)
      : transport_(std::move(transport)),
        device_(device),
        whole_(std::move(whole)),
        requests_(std::move(requests)),
        order_(collective() ? StreamOrder(device) : StreamOrder()),
        watched_(std::move(watched)),
        finish_(std::move(finish)) {}

  void wait() override {
    transport_->wait(requests_, whole_);
    if (std::exchange(finished_, true)) return;
    settle_sends();
    if (const auto problem = watched_.written()) transport_->raise(transport_->rank(), whole_, *problem);
    if (finish_) finish();
    for (const auto& request : requests_) {
      if (request->kind != Request::Kind::receive) continue;
      if (const auto problem = request->message.tensors->written()) {
        transport_->raise(request->peer, whole_, str("rank ", request->peer, ": ", *problem));
      }
    }
    for (const auto& request : requests_) request->message.tensors.reset();
  }

  void synchronize() override {
    wait();
    if (device_.is_cpu()) return;
    StreamOrder(device_).synchronize();
    transport_->wait({}, whole_);
  }

  bool done() const override {
    if (!transport_->done(requests_)) return false;
    if (!finished_) settle_sends();
    return true;
  }

  Tensors take() override {
    wait();
    DUALPIPE_CHECK(!std::exchange(taken_, true), whole_.describe(), ": its tensors were taken before");
    return std::move(result_);
  }

  Span span() const override {
    std::int64_t begin = whole_.header.issued_ns;
    std::int64_t end = begin;
    for (const auto& request : requests_) {
      if (request->kind == Request::Kind::receive) begin = std::max(begin, request->message.header.issued_ns);
      end = std::max(end, request->completed_ns);
    }
    return {seconds_of(begin), seconds_of(std::max(begin, end))};
  }

 private:
  bool collective() const { return whole_.header.channel == Channel::collective; }

  /// On a device, a collective reads on this rank's stream what other ranks made on theirs.
  void finish() {
    const Finish finish = std::exchange(finish_, nullptr);  // holds tensors that are read
    order_.enter();
    for_received([](MessageTensors& tensors) { tensors.enter(); });
    result_ = finish();
    for_received([](MessageTensors& tensors) { tensors.leave(); });
    order_.leave();
  }

  /// For the messages of a collective; those of a receive are ordered when they are taken.
  template <class Action>
  void for_received(const Action& action) const {
    if (!collective()) return;
    for (const auto& request : requests_)
      if (request->kind == Request::Kind::receive) action(*request->message.tensors);
  }

  /// A send that a receive has matched but not taken is over for the sender once both share no memory.
  void settle_sends() const {
    for (const auto& request : requests_) {
      if (request->kind == Request::Kind::send && request->done && request->message.tensors) {
        request->message.tensors->settle();
      }
    }
  }

  std::shared_ptr<Transport> transport_;
  at::Device device_;
  Request whole_;
  Requests requests_;
  StreamOrder order_;
  Watch watched_;
  Finish finish_;
  Tensors result_;
  bool finished_ = false;
  bool taken_ = false;
};

/// Completes when the work already queued on the current stream completes.
class MessageFence final : public Pending::State {
 public:
  MessageFence(std::shared_ptr<Transport> transport, at::Device device, const Header& header)
      : transport_(std::move(transport)), whole_(Request::collective(header)), order_(device) {}

  void wait() override {
    transport_->wait({}, whole_);
    order_.enter();
  }
  void synchronize() override {
    order_.synchronize();
    transport_->wait({}, whole_);
  }
  bool done() const override { return order_.done() || transport_->has_failed(); }
  Tensors take() override { return wait(), Tensors(); }
  Span span() const override {
    const double made = seconds_of(whole_.header.issued_ns);
    return {made, made};
  }

 private:
  std::shared_ptr<Transport> transport_;
  Request whole_;
  StreamOrder order_;
};

}  // namespace dualpipe::detail
