#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "dualpipe/detail/comm/message_communicator.hpp"

// The Pendings of a MessageCommunicator.
namespace dualpipe::detail {

using Requests = std::vector<std::shared_ptr<Request>>;

inline double seconds(std::int64_t ns) { return static_cast<double>(ns) * 1e-9; }

/// The transfers of one call, and what remains to be done on the caller's thread when all have ended.
class MessageOperation final : public Pending::State {
 public:
  using Finish = std::function<Tensors()>;

  /// @param whole    names the call in errors.
  /// @param watched  tensors that the caller must not write to before wait().
  MessageOperation(std::shared_ptr<Transport> transport, at::Device device, Request whole, Requests transfers,
                   Watch watched, Finish finish)
      : transport_(std::move(transport)),
        device_(device),
        whole_(std::move(whole)),
        transfers_(std::move(transfers)),
        order_(collective() ? StreamOrder(device) : StreamOrder()),
        watched_(std::move(watched)),
        finish_(std::move(finish)) {}

  void wait() override {
    transport_->wait(transfers_, whole_);
    if (std::exchange(finished_, true)) return;
    settle_sends();
    if (const auto problem = watched_.written()) transport_->raise(transport_->rank(), whole_, *problem);
    if (finish_) finish();
    for (const auto& transfer : transfers_) {
      if (transfer->kind != Request::Kind::receive) continue;
      if (const auto problem = transfer->message.parcel->written()) {
        transport_->raise(transfer->peer, whole_, str("rank ", transfer->peer, ": ", *problem));
      }
    }
    for (const auto& transfer : transfers_) transfer->message.parcel.reset();
  }

  void synchronize() override {
    wait();
    if (device_.is_cpu()) return;
    StreamOrder(device_).synchronize();
    transport_->wait({}, whole_);
  }

  bool done() const override {
    if (!transport_->done(transfers_)) return false;
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
    for (const auto& transfer : transfers_) {
      if (transfer->kind == Request::Kind::receive) begin = std::max(begin, transfer->message.header.issued_ns);
      end = std::max(end, transfer->completed_ns);
    }
    return {seconds(begin), seconds(std::max(begin, end))};
  }

 private:
  bool collective() const { return whole_.header.channel == Channel::collective; }

  /// On a device, collectives read on this rank's stream what others made on theirs.
  void finish() {
    const Finish finish = std::exchange(finish_, nullptr);  // holds tensors that are read
    order_.enter();
    for_parcels_of_others([](MessageTensors& parcel) { parcel.enter(); });
    result_ = finish();
    for_parcels_of_others([](MessageTensors& parcel) { parcel.leave(); });
    order_.leave();
  }

  template <class Action>
  void for_parcels_of_others(const Action& action) const {
    if (!collective()) return;  // a receive takes its tensors, which sees to that
    for (const auto& transfer : transfers_)
      if (transfer->kind == Request::Kind::receive) action(*transfer->message.parcel);
  }

  // A send that the receiver has met but not taken yet is over for the sender once both do not share memory.
  void settle_sends() const {
    for (const auto& transfer : transfers_) {
      if (transfer->kind == Request::Kind::send && transfer->done && transfer->message.parcel) {
        transfer->message.parcel->settle();
      }
    }
  }

  std::shared_ptr<Transport> transport_;
  at::Device device_;
  Request whole_;
  Requests transfers_;
  StreamOrder order_;
  Watch watched_;
  Finish finish_;
  Tensors result_;
  bool finished_ = false;
  bool taken_ = false;
};

/// A moment of the stream that was current when it was made.
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
    const double made = seconds(whole_.header.issued_ns);
    return {made, made};
  }

 private:
  std::shared_ptr<Transport> transport_;
  Request whole_;
  StreamOrder order_;
};

}  // namespace dualpipe::detail
